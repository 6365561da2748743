"""From a state of factors to a dense one and back, without any framework."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

from fedpara_plugins import ConfigError, FedParaConfig, MismatchError, ModelSpec, convert
from fedpara_plugins.exchange import dense_round
from fedpara_plugins.exchange.dense_round import (
    DenseRound,
    converted_copy,
    log_idle_options,
    refuse_in_factor_space,
)
from fedpara_plugins.exchange.settings import ExchangeSettings


class Net(nn.Module):
    """Most kinds at once; a tied table, a norm with buffers, a layer that stays dense."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 32, padding_idx=0)
        self.conv = nn.Conv1d(32, 32, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(32)
        self.lstm = nn.LSTM(32, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.tied = nn.Linear(32, 40, bias=False)
        self.source = nn.Embedding(40, 32)
        self.tied.weight = self.source.weight
        self.head = nn.Linear(32, 4)

    def forward(self, tokens):
        x = self.table(tokens) + self.source(tokens)
        x = self.norm(self.conv(x.transpose(1, 2))).transpose(1, 2)
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x)
        return self.head(x.mean(1)) + self.tied(x.mean(1))[:, :4]


METHODS = ("lowrank", "fedpara", "pfedpara")


def _begun(method, **options):
    torch.manual_seed(0)
    plain = Net()
    model = convert(copy.deepcopy(plain), method=method, min_size=256, gamma=0.3, **options)
    spec = ModelSpec.of(model)
    return plain, spec, DenseRound(spec, model.state_dict()), model.state_dict()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, {"tanh": True}, {"private": "head.*"}], ids=str)
def test_nothing_trained_is_nothing_changed(method, options):
    plain, _, found, full = _begun(method, **options)
    plain.load_state_dict(found.dense, strict=True)
    after = found.to_factors(plain.state_dict())
    assert list(after) == list(full)
    assert all(torch.equal(after[name], full[name]) for name in full)
    assert found.kept == {}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_training_arrives(method):
    """The composed weights move along the update; everything else arrives as it is."""
    plain, spec, found, full = _begun(method)
    plain.load_state_dict(found.dense, strict=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    plain.train()(torch.randint(0, 40, (8, 6))).square().sum().backward()
    optimizer.step()
    trained = {name: value.clone() for name, value in plain.state_dict().items()}
    after = found.to_factors(trained)
    assert list(after) == list(full)
    assert set(found.kept) == set(spec.weights)
    arrived = spec.dense_state(after)
    for name, value in trained.items():
        if name not in spec.weights:
            assert torch.equal(arrived[name], value)
            continue
        wanted = value - found.dense[name]
        moved = arrived[name] - found.dense[name]
        along = float((moved * wanted).sum() / wanted.square().sum())
        assert along == pytest.approx(1, abs=0.05)
        assert 0.01 < found.kept[name] < 1
    assert not arrived["table.weight"][0].any()
    assert torch.equal(arrived["tied.weight"], arrived["source.weight"])
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in full.items()}
    assert int(after["norm.num_batches_tracked"]) == 1


def test_private_state_of_the_user_s_is_among_what_comes_back():
    _, spec, found, _ = _begun("pfedpara", private="head.*")
    trained = {name: value + 1 for name, value in found.dense.items()}
    after = found.to_factors(trained)
    assert {"head.weight", "head.bias"} <= spec.private_keys
    assert torch.equal(after["head.bias"], trained["head.bias"])
    assert any(not torch.equal(after[k], found._full[k]) for k in spec.private_factors)


def test_a_part_of_the_state_and_names_of_other_things():
    _, spec, found, _ = _begun("fedpara")
    name = "conv.weight"
    after = found.to_factors({name: found.dense[name] + 1, "another": torch.ones(2)})
    assert set(after) == {*spec.factor_keys(name).values(), "another"}


@pytest.mark.parametrize("wrong", [torch.ones(3, 3), torch.ones(32, 16, 3, dtype=torch.int64)])
def test_a_weight_of_another_shape_or_kind_is_named(wrong):
    _, _, found, _ = _begun("fedpara")
    with pytest.raises(MismatchError, match=r"'conv.weight' of shape") as caught:
        found.to_factors({"conv.weight": wrong})
    assert "(32, 16, 3)" in str(caught.value)


def test_a_copy_is_converted_and_neither_model_nor_random_state_is_touched():
    torch.manual_seed(1)
    plain = Net()
    before, state = copy.deepcopy(plain.state_dict()), torch.get_rng_state()
    found = converted_copy(plain, FedParaConfig(method="fedpara", min_size=256))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in before.items())
    assert "conv.x1" in found.state_dict()


# Options ----------------------------------------------------------------------------------------


def test_the_option():
    config = FedParaConfig.from_mapping({"local": "dense", "method": "fedpara"})
    assert config.local == "dense"
    assert FedParaConfig().local == "factors"
    with pytest.raises(ConfigError, match=r"'factors' or 'dense'.*both"):
        FedParaConfig(local="both")
    settings = {
        m: ExchangeSettings.read({"local": "dense", "method": m}) for m in ("none", "fedpara")
    }
    dense = {m: ExchangeSettings(**fields).trains_dense for m, fields in settings.items()}
    assert dense == {"none": False, "fedpara": True}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"schedule": "decoupled"}, "private and shared steps"),
        ({"schedule": "decoupled", "private_head": True}, "private_head"),
        ({"label_prior": True}, "logits"),
    ],
)
def test_what_acts_inside_a_converted_model_is_refused_by_name(options, words):
    with pytest.raises(ConfigError, match=words) as caught:
        FedParaConfig(method="pfedpara", local="dense", **options)
    assert "local='factors'" in str(caught.value)
    FedParaConfig(method="pfedpara", **options)


def test_conversion_takes_no_notice():
    torch.manual_seed(0)
    one = convert(nn.Linear(64, 64), method="fedpara", local="dense")
    torch.manual_seed(0)
    other = convert(nn.Linear(64, 64), method="fedpara")
    assert ModelSpec.of(one).fingerprint == ModelSpec.of(other).fingerprint
    assert torch.equal(one.x1, other.x1)


def test_optimizers_that_correct_by_sums_over_factors():
    refuse_in_factor_space("Any", FedParaConfig(method="fedpara"))
    refuse_in_factor_space("Any", FedParaConfig(method="none", local="dense"))
    with pytest.raises(ConfigError, match="Any does not go with local='dense'"):
        refuse_in_factor_space("Any", FedParaConfig(method="fedpara", local="dense"))


def test_idle_options_are_told_once(caplog, monkeypatch):
    monkeypatch.setattr(dense_round, "_told", set())
    caplog.set_level(logging.INFO, "fedpara")
    config = FedParaConfig(method="fedpara", local="dense", clip=1.0)
    log_idle_options(config)
    log_idle_options(config)
    (line,) = [record.getMessage() for record in caplog.records]
    assert "clip" in line
    assert "local='dense'" in line
