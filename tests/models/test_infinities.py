"""Infinities that belong to a model, and those that are divergence."""

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConversionError, PayloadError
from fedpara_plugins.cli.doctor import check_model
from fedpara_plugins.cli.export import dense_from
from fedpara_plugins.cli.plan import plan_traffic
from fedpara_plugins.models import (
    check_finite,
    load_factors,
    restore_infinities,
    save_factors,
)
from fedpara_plugins.models.checkpoint_files import read_checkpoint

INF = float("inf")
NAN = float("nan")


class Masked(nn.Module):
    """A causal mask in the state, a frozen one among the parameters, and one in a bias."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("mask", torch.full((9, 9), -INF).triu(1))
        self.frozen = nn.Parameter(torch.full((3, 3), -INF).triu(1), requires_grad=False)
        with torch.no_grad():
            self.layer.bias[0] = -INF


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS)
def test_what_was_infinite_before_is_no_divergence(dtype):
    mask = torch.full((4, 4), -INF).triu(1).to(dtype)
    check_finite({"mask": mask.clone()}, {"mask": mask})
    for other in (None, {}, {"mask": torch.zeros(4, 4).to(dtype)}, {"mask": mask[:2]}):
        with pytest.raises(PayloadError, match=r"'mask' holds 6 NaN or infinite values of 16"):
            check_finite({"mask": mask}, other)


@pytest.mark.parametrize(
    ("before", "now", "count"),
    [
        ([-INF, 1.0], [-INF, 2.0], 0),
        ([-INF, 1.0], [-INF, INF], 1),
        ([-INF, 1.0], [INF, 1.0], 1),
        ([-INF, 1.0], [NAN, 1.0], 1),
        ([NAN, 1.0], [NAN, 1.0], 0),
        ([NAN, 1.0], [INF, NAN], 2),
        ([-INF, 1.0], [0.0, 1.0], 0),
        ([1.0, 1.0], [1e30, 1.0], 0),
    ],
)
def test_only_values_that_became_so_count(before, now, count):
    before, now = {"w": torch.tensor(before)}, {"w": torch.tensor(now)}
    if not count:
        check_finite(now, before)
        return
    with pytest.raises(PayloadError, match=rf"'w' holds {count} NaN or infinite values of 2"):
        check_finite(now, before)


def test_tensors_without_such_values_are_passed_over():
    check_finite(
        {"n": torch.tensor(3), "b": torch.tensor([True]), "c": torch.ones(2, dtype=torch.cfloat)}
    )
    with pytest.raises(PayloadError, match="'c' holds 1 "):
        check_finite({"c": torch.tensor([complex(INF, 0)])})


def test_the_remedy_that_the_error_names_works():
    """A mask that training fills is kept out of the state."""
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.zeros(2), persistent=False)
    sent = {name: value.clone() for name, value in model.state_dict().items()}
    model.mask.fill_(-INF)
    check_finite(model.state_dict(), sent)


def test_server_rules_do_not_lose_a_mask():
    mask = torch.full((3, 3), -INF).triu(1)
    origin = {"mask": mask, "w": torch.ones(2)}
    averaged = {"mask": mask + (mask - mask), "w": torch.zeros(2)}
    assert averaged["mask"].isnan().any()
    restored = restore_infinities(averaged, origin)
    assert torch.equal(restored["mask"], mask)
    assert torch.equal(restored["w"], torch.zeros(2))
    assert averaged["mask"].isnan().any()  # the argument stays


@pytest.mark.parametrize("method", ["fedpara", "pfedpara"])
def test_a_masked_model_is_converted_and_comes_back(method, tmp_path):
    model = Masked()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    fedpara.convert(model, method=method, gamma=0.3)
    dense = fedpara.to_dense(model).state_dict()
    save_factors(model, tmp_path / "f.safetensors")
    load_factors(model, tmp_path / "f.safetensors")
    exported, _ = dense_from(read_checkpoint(tmp_path / "f.safetensors"))
    for found in (dense, exported):
        for name in ("mask", "frozen", "layer.bias"):
            assert torch.equal(found[name], state[name])


def test_a_value_that_became_infinite_is_refused_on_the_way_back():
    model = fedpara.convert(Masked(), method="fedpara", gamma=0.3)
    model.layer.bias.data[1] = NAN
    with pytest.raises(ConversionError, match="diverged"):
        fedpara.to_dense(model)
    plain = fedpara.convert(nn.Sequential(nn.Linear(64, 64)), method="fedpara", gamma=0.3)
    plain[0].bias.data[1] = INF
    with pytest.raises(ConversionError, match="diverged"):
        fedpara.to_dense(plain)


@pytest.mark.parametrize("value", [INF, NAN])
def test_a_matrix_that_is_factorised_must_be_finite(value):
    model = Masked()
    model.layer.weight.data[0, 0] = value
    with pytest.raises(ConversionError, match=r"'layer'.*exclude"):
        fedpara.convert(model, gamma=0.3)
    assert type(fedpara.convert(model, method="none", exclude=["layer"]).layer) is nn.Linear


def test_doctor_names_such_tensors():
    found = [str(f) for f in check_model(Masked(), fedpara.FedParaConfig(method="fedpara"))]
    (text,) = [line for line in found if " mask: " in line]
    assert "holds 36 infinite values" in text
    assert any(" layer.bias: holds 1 infinite" in line for line in found)


def test_plan_leaves_a_mask_as_it_is():
    plan = plan_traffic(Masked(), fedpara.FedParaConfig(method="fedpara", codec="lossless"))
    assert plan.messages[-1].size > 0
