"""Models in the residual form: what trains, what is described, what is kept."""

import copy
import json

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import (
    ConfigError,
    ConversionError,
    FedParaConfig,
    MismatchError,
    ModelSpec,
    PayloadError,
)
from fedpara_plugins.factors.methods import Method
from fedpara_plugins.factors.plan import WeightSlot
from fedpara_plugins.factors.planning import plan_weight
from fedpara_plugins.models import agreed_config, load_factors, report, save_factors
from fedpara_plugins.models.checkpoint_files import read_checkpoint
from fedpara_plugins.models.spec_rows import plan_from_row

METHODS = ("lowrank", "fedpara", "pfedpara")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.Linear(96, 64))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


def net():
    torch.manual_seed(0)
    return Net()


def frozen(**options):
    return fedpara.convert(net(), **{"method": "lowrank", "base": "frozen", "rank": 4} | options)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


FACTORS = {f"body.{i}.{f}" for i in (0, 2) for f in ("x1", "y1")}
OTHERS = {"body.0.bias", "body.1.weight", "body.1.bias", "body.2.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("options", "others"),
    [
        ({}, OTHERS),
        ({"trainable": "none"}, set()),
        ({"trainable": "head.*"}, {"head.weight", "head.bias"}),
        ({"trainable": "body.1.*, *.0.bias"}, {"body.1.weight", "body.1.bias", "body.0.bias"}),
        ({"trainable": "none", "private": "head.*"}, {"head.weight", "head.bias"}),
        ({"trainable": ("*", "head.*")}, OTHERS),
    ],
    ids=str,
)
def test_what_trains(options, others):
    assert trained(frozen(**options)) == FACTORS | others
    assert trained(frozen(train="right", **options)) == {"body.0.x1", "body.2.x1"} | others


def test_patterns_train_what_was_frozen_and_a_star_leaves_it():
    model = net().requires_grad_(False)
    options = {"method": "lowrank", "base": "frozen", "rank": 4}
    assert trained(fedpara.convert(copy.deepcopy(model), **options)) == FACTORS
    both = fedpara.convert(model, trainable="*,head.*", **options)
    assert trained(both) == FACTORS | {"head.weight", "head.bias"}


def test_a_tied_parameter_trains_if_one_of_its_names_does():
    model = net()
    model.body[2].bias = nn.Parameter(torch.zeros(64))
    model.head.extra = model.body[2].bias
    model = fedpara.convert(model, method="lowrank", base="frozen", rank=4, trainable="head.extra")
    assert model.body[2].bias.requires_grad
    assert not model.head.weight.requires_grad


def test_a_pattern_that_matches_nothing_names_what_there_is():
    with pytest.raises(ConfigError, match=r"'trainable': pattern 'haed.weight'.*mean 'head.w"):
        frozen(trainable="haed.weight")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base": "frozen", "init": "fit"}, "'init'.*base='frozen'"),
        ({"base": "frozen", "local": "dense"}, "'local'.*base='frozen'"),
        ({"base": "factors", "train": "right"}, "'train'.*base='frozen'"),
        ({"base": "ice"}, "'base'.*'factors' or 'frozen'"),
        ({"train": "left"}, "'train'.*'both' or 'right'"),
        ({"base": "frozen", "train": "right", "tanh": True}, "'train'.*tanh"),
        ({"trained": "yes"}, "'trained'.*'keep' or 'discard'"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options, says):
    with pytest.raises(ConfigError, match=says):
        FedParaConfig(method="fedpara", **options)


# The description


@pytest.mark.parametrize("options", [{}, {"train": "right"}, {"core": True}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_description_says_everything(method, options):
    layer = nn.Sequential(nn.Conv2d(16, 24, 3))
    model = fedpara.convert(layer, method=method, base="frozen", rank=3, **options)
    spec = ModelSpec.of(model)
    data = json.loads(json.dumps(spec.to_json()))
    other = ModelSpec.from_json(data, tuple(fedpara.split(model).shared))
    assert other == spec
    assert other.fingerprint == spec.fingerprint
    spec.check_described(data, here="a", there="b")
    assert other.weights["0.weight"].method.combine is spec.weights["0.weight"].method.combine


@pytest.mark.parametrize(
    "other", [{"base": "factors"}, {"train": "right"}, {"core": True}], ids=str
)
def test_another_form_is_another_model(other):
    def spec(**options):
        layer = nn.Sequential(nn.Conv2d(16, 24, 3))
        return ModelSpec.of(fedpara.convert(layer, **{"method": "lowrank", "rank": 3} | options))

    mine, theirs = spec(base="frozen"), spec(**{"base": "frozen"} | other)
    with pytest.raises(MismatchError, match=r"0\.weight'.*a frozen weight and an update by low"):
        mine.check_equal(theirs, here="this side", there="that side")
    with pytest.raises(MismatchError, match="frozen"):
        mine.check_described(theirs.to_json(), here="this side", there="that side")


@pytest.mark.parametrize(
    "end",
    [["melted", True, True], ["frozen", 1, True], ["frozen", True], "frozen", 7, None],
    ids=str,
)
def test_a_malformed_form_is_refused(end):
    model = frozen()
    data = ModelSpec.of(model).to_json()
    shared = tuple(fedpara.split(model).shared)
    data["weights"][0][7] = end
    with pytest.raises(PayloadError, match="malformed"):
        ModelSpec.from_json(data, shared)
    with pytest.raises(PayloadError, match="malformed"):
        ModelSpec.of(model).check_described(data, here="a", there="b")


def test_a_row_of_the_residual_form_has_an_entry_that_earlier_releases_refuse():
    """They read at most seven."""
    row = ModelSpec.of(frozen()).to_json()["weights"][0]
    assert row[6:] == [0.0, ["frozen", True, False]]
    assert len(ModelSpec.of(fedpara.convert(net(), rank=4)).to_json()["weights"][0]) == 6
    assert plan_from_row(row).residual


def test_the_form_of_a_run_is_taken_from_its_specs():
    residual, factors = ModelSpec.of(frozen()), ModelSpec.of(fedpara.convert(net(), rank=4))
    auto = FedParaConfig(method="lowrank")
    assert agreed_config(auto, [residual]).base == "frozen"
    assert agreed_config(auto, [factors]).base == "factors"
    assert agreed_config(auto, []) == auto
    own = FedParaConfig(method="lowrank", base="factors", init="fit")
    assert agreed_config(own, [residual]).base == "factors"
    assert agreed_config(own, [residual]).trained == "discard"


# Values


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_comes_back_and_exports(method, private, tmp_path):
    model = frozen(method=method)
    with torch.no_grad():
        for name in trained(model):
            model.get_parameter(name).add_(0.1)
    save_factors(model, tmp_path / "factors.safetensors", private=private)
    other = frozen(method=method)
    load_factors(other, tmp_path / "factors.safetensors")
    shared = fedpara.split(model).shared
    assert all(torch.equal(other.state_dict()[name], value) for name, value in shared.items())
    found = read_checkpoint(tmp_path / "factors.safetensors")
    expected = fedpara.to_dense(model if private else other).state_dict()
    for name, value in found.spec.dense_state(found.tensors).items():
        torch.testing.assert_close(value, expected[name])


def test_the_report_tells_frozen_weights_from_what_travels():
    model = frozen(train="right")
    rows = {row.name: row for row in report(model).rows}
    assert "frozen, with an update by lowrank" in rows["body.0.weight"].note
    assert rows["body.0.weight"].shared_bytes == 4 * model.body[0].x1.numel()
    assert rows["body.0.weight"].dense_bytes == 4 * 64 * 96
    assert report(model).parameters == sum(p.numel() for p in model.parameters())
    assert report(model).dense_parameters == sum(p.numel() for p in net().parameters())


@pytest.mark.parametrize("train", ["both", "right"])
def test_decay_shrinks_the_update_as_a_dense_one_and_leaves_the_base(train):
    model = frozen(train=train, method="lowrank")
    layer = model.body[0]
    with torch.no_grad():
        layer.x1.normal_()
    base, before = layer.weight_base.clone(), layer.weight.detach() - layer.weight_base
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5).step()
    assert torch.equal(layer.weight_base, base)
    after = layer.weight.detach() - layer.weight_base
    torch.testing.assert_close(after, 0.95 * before, rtol=1e-4, atol=1e-5)


def test_private_steps_train_the_private_update_and_shared_steps_the_other():
    model = frozen(method="pfedpara", schedule="decoupled", first_private_steps=1)
    x = torch.randn(8, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for moved in ("x2", "x1"):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        now = model.state_dict()
        changed = {n.rpartition(".")[2] for n, v in now.items() if not torch.equal(v, before[n])}
        assert changed & {"x1", "x2"} == {moved}
        assert "weight_base" not in changed


class Packed(torch.Tensor):
    """A quantised tensor, as those of torchao: it answers no questions about its values."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ in ("isfinite", "isinf", "isnan", "abs", "max"):
            raise NotImplementedError(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_quantised_weight_is_refused_by_name():
    model = net()
    model.head.weight = nn.Parameter(torch.zeros(10, 64).as_subclass(Packed), requires_grad=False)
    options = {"method": "lowrank", "base": "frozen", "rank": 4}
    with pytest.raises(ConversionError, match=r"'head': weight is a Packed.*quantised"):
        fedpara.convert(model, min_size=0, **options)
    fedpara.convert(model, exclude="head", **options)


def test_a_method_whose_update_would_not_start_at_zero_is_left_out():
    shift = Method(name="shift", operands=1, combine=lambda w: w[0] + 1, speed=0.25)
    slot = WeightSlot("weight", (64, 64), 64, 0.01)
    found = plan_weight(slot, shift, FedParaConfig(method="lowrank", rank=4, base="frozen"))
    assert isinstance(found, str)
    assert "zero" in found
