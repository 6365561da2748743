"""The head's private parts in config, conversion, spec, split, files and reports."""

import json
from math import prod

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError, ConversionError, MismatchError, ModelSpec, PayloadError
from fedpara_plugins.cli.export import dense_from
from fedpara_plugins.cli.inspect_file import inspect_file
from fedpara_plugins.models.checkpoint_files import read_checkpoint
from fedpara_plugins.models.checkpoints import load_factors, save_factors

BOTH = {"private_head": True, "label_prior": True, "schedule": "decoupled"}
CLASSES = 40


class Net(nn.Module):
    """The layer that gives class scores is not the last one."""

    def __init__(self, bias=True, classes=CLASSES):
        super().__init__()
        self.body = nn.Linear(64, 96)
        self.norm = nn.LayerNorm(96)
        self.classify = nn.Linear(96, classes, bias=bias)
        self.auxiliary = nn.Linear(96, 7)

    def forward(self, x):
        return self.classify(self.norm(self.body(x)))


def build(**options):
    torch.manual_seed(0)
    defaults = {"method": "pfedpara", "gamma": 0.3, "head": "classify", **BOTH}
    return fedpara.convert(Net(), **{**defaults, **options})


def scattered(**options):
    model = build(**options)
    with torch.no_grad():
        for layer in (model.body, model.classify):
            for parameter in layer.private_parameters():
                parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(params=[(), ("classify",)], ids=["factorised", "dense"])
def model(request):
    return scattered(exclude=request.param)


# Options


def test_options_are_read_from_text():
    config = fedpara.FedParaConfig.from_mapping(
        {"private-head": "true", "label-prior": "1", "schedule": "decoupled", "head": "classify"}
    )
    assert (config.private_head, config.label_prior, config.head) == (True, True, "classify")
    assert fedpara.FedParaConfig.from_mapping({}).head == ""


def test_the_last_linear_layer_is_the_head_unless_another_is_named():
    parts = fedpara.split(build(head=""))
    assert [k for k in parts.private if "correction" in k] == ["auxiliary.correction"]
    assert "classify.correction" in fedpara.split(build()).private
    single = fedpara.convert(nn.Linear(64, 64), method="pfedpara", label_prior=True)
    assert "label_prior" in fedpara.split(single).private


def test_without_the_options_nothing_is_different():
    plain, named = (
        fedpara.convert(Net(), method="pfedpara", gamma=0.3, **more)
        for more in ({}, {"head": "classify"})
    )
    assert ModelSpec.of(plain).fingerprint == ModelSpec.of(named).fingerprint
    assert ModelSpec.of(plain).to_json() == ModelSpec.of(named).to_json()
    assert "own" not in ModelSpec.of(plain).to_json()


def test_method_none_leaves_the_model_alone_whatever_the_options():
    model = build(method="none")
    assert type(model.classify) is nn.Linear
    assert list(model.state_dict()) == list(Net().state_dict())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"schedule": "joint"}, ConfigError, "which only schedule='decoupled' has"),
        ({"method": "fedpara"}, ConfigError, "private_head.*use method='pfedpara'"),
        ({"method": "lowrank"}, ConfigError, "no weight of the model has private factors"),
        ({"head": "clasify"}, ConfigError, "no layer 'clasify'.*body, classify, auxiliary"),
        ({"head": "norm"}, ConversionError, "'norm' is a LayerNorm, expected exactly nn.Linear"),
        ({"private": ("classify.*",)}, ConfigError, "'classify' is private already"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        build(**options)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: Net(bias=False), "has no bias.*bias=True.*label_prior=False"),
        (lambda: Net(classes=1), "one output"),
        (lambda: nn.Sequential(nn.Conv2d(16, 32, 3)), "no layer for private_head.*none"),
    ],
)
def test_models_that_cannot_have_it_are_refused_and_left_as_they_are(net, words):
    model = net()
    before = {k: type(v) for k, v in model.named_modules()}
    head = "classify" if isinstance(model, Net) else ""
    with pytest.raises(ConversionError, match=words):
        fedpara.convert(model, method="pfedpara", min_size=0, head=head, **BOTH)
    assert {k: type(v) for k, v in model.named_modules()} == before


def test_a_tied_head_is_refused():
    model = Net()
    model.body = nn.Linear(96, CLASSES)
    model.body.weight = model.classify.weight
    with pytest.raises(ConversionError, match=r"weight of layer 'classify' stands at body\.weight"):
        fedpara.convert(model, method="pfedpara", min_size=0, head="classify", **BOTH)
    other = Net()
    other.again = other.classify
    with pytest.raises(ConversionError, match=r"again"):
        fedpara.convert(other, method="pfedpara", head="classify", exclude=("classify",), **BOTH)


# Spec, split and merge


def test_shared_and_private_names(model):
    private = set(fedpara.split(model).private)
    assert {"classify.correction", "classify.label_prior", "body.x2", "body.y2"} <= private
    assert ("classify.x2" in private) == ("classify.x1" in model.state_dict())
    plain = fedpara.convert(
        Net(),
        method="pfedpara",
        gamma=0.3,
        exclude=() if "classify.x1" in model.state_dict() else ("classify",),
    )
    assert list(fedpara.split(model).shared) == list(fedpara.split(plain).shared)


def test_first_values_are_zero_and_complete(model):
    spec = ModelSpec.of(model)
    first = spec.initial_private(fedpara.split(model).shared)
    assert first.keys() == fedpara.split(model).private.keys()
    assert first["classify.correction"].shape == (CLASSES, 96)
    assert first["classify.label_prior"].shape == (CLASSES,)
    assert not first["classify.correction"].any()
    assert not first["classify.label_prior"].any()
    model.load_state_dict(fedpara.merge(spec, fedpara.split(model).shared, first), strict=True)


def test_spec_travels_as_json(model):
    spec = ModelSpec.of(model)
    again = ModelSpec.from_json(json.loads(json.dumps(spec.to_json())), spec.shared_keys)
    assert (again.keys, again.private_keys) == (spec.keys, spec.private_keys)
    assert again.fingerprint == spec.fingerprint
    assert again.initial_private().keys() == spec.initial_private().keys()
    mine, theirs = (one.dense_state(model.state_dict()) for one in (spec, again))
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_dense_state_folds_exactly(model):
    dense = ModelSpec.of(model).dense_state(model.state_dict())
    assert list(dense) == list(Net().state_dict())
    state = {k: v.double() for k, v in model.state_dict().items()}
    weight = state.get("classify.weight")
    if weight is None:
        w1, w2 = (state[f"classify.x{i}"] @ state[f"classify.y{i}"].T for i in (1, 2))
        weight = model.classify.plans["weight"].scale * w1 * (w2 + 1)
    expected = weight + state["classify.correction"]
    torch.testing.assert_close(dense["classify.weight"].double(), expected, rtol=1e-5, atol=1e-6)
    bias = model.classify.bias + model.classify.label_prior
    assert torch.equal(dense["classify.bias"], bias)
    plain = Net().eval()
    plain.load_state_dict(dense, strict=True)
    x = torch.randn(5, 64)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


def test_dense_state_of_the_shared_part_has_neither(model):
    spec = ModelSpec.of(model)
    dense = spec.dense_state(fedpara.split(model).shared)
    assert torch.equal(dense["classify.bias"], model.classify.bias)
    fresh = spec.dense_state({**fedpara.split(model).shared, **spec.initial_private()})
    assert all(torch.equal(dense[k], fresh[k]) for k in dense)


def test_dense_bytes_are_those_of_the_dense_model(model):
    expected = sum(v.numel() * v.element_size() for v in Net().state_dict().values())
    spec = ModelSpec.of(model)
    assert spec.dense_bytes(model.state_dict()) == expected
    assert spec.dense_bytes(fedpara.split(model).shared) == expected


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"label_prior": False}, "classify.label_prior"),
        ({"private_head": False}, "classify.correction"),
        ({"head": "auxiliary"}, "auxiliary.correction"),
    ],
)
def test_two_sides_with_other_private_parts_disagree(options, name):
    mine, theirs = ModelSpec.of(build()), ModelSpec.of(build(**options))
    assert mine.fingerprint != theirs.fingerprint
    with pytest.raises(MismatchError, match=name):
        mine.check_equal(theirs, here="client", there="server")
    mine.check_equal(ModelSpec.of(build()), here="client", there="server")


@pytest.mark.parametrize(
    "damage",
    [
        lambda own: own["classify.correction"].append("surplus"),
        lambda own: own.pop("classify.correction"),
        lambda own: own["classify.label_prior"].__setitem__(0, "wide"),
        lambda own: own["classify.label_prior"].__setitem__(4, "body.weight"),
    ],
)
def test_damaged_descriptions_are_refused(damage):
    spec = ModelSpec.of(build())
    data = json.loads(json.dumps(spec.to_json()))
    damage(data["own"])
    with pytest.raises(PayloadError):
        ModelSpec.from_json(data, spec.shared_keys)


def test_a_private_part_that_does_not_fit_its_place_is_refused(model):
    spec = ModelSpec.of(model)
    state = {**model.state_dict(), "classify.correction": torch.zeros(1, 96)}
    with pytest.raises(PayloadError, match=r"'classify.correction' of shape \(1, 96\)"):
        spec.dense_state(state)


# Files and reports


def test_factor_checkpoint_with_and_without_the_private_parts(model, tmp_path):
    for private in (True, False):
        path = tmp_path / f"{private}.safetensors"
        save_factors(model, path, private=private)
        found = read_checkpoint(path)
        assert ("classify.correction" in found.tensors) == private
        dense, _ = dense_from(found, Net())
        expected = ModelSpec.of(model).dense_state(found.tensors)
        assert all(torch.equal(dense[k], expected[k]) for k in expected)
        assert "classify.label_prior" in inspect_file(path) or not private
    other = build(exclude=() if "classify.x1" in model.state_dict() else ("classify",))
    load_factors(other, tmp_path / "True.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])
    load_factors(other, tmp_path / "False.safetensors")
    assert torch.equal(other.classify.correction, model.classify.correction)


def test_a_correction_of_another_shape_than_the_file_describes_is_refused(model, tmp_path):
    path = tmp_path / "file.safetensors"
    save_factors(model, path)
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    tensors = {**load_file(path), "classify.correction": torch.zeros(1, 96)}
    save_file(tensors, path, metadata=about)
    with pytest.raises(PayloadError, match=r"of another shape \['classify\.correction'\]"):
        read_checkpoint(path)


def test_report_says_which_layer_and_counts_the_parts_as_not_sent(model):
    found = fedpara.report(model)
    rows = {row.name: row for row in found.rows}
    correction, prior = rows["classify.correction"], rows["classify.label_prior"]
    assert correction.parameters == CLASSES * 96
    assert prior.parameters == CLASSES
    assert correction.shared_bytes == correction.dense_parameters == prior.shared_bytes == 0
    assert "private, added to weight of the head" in str(found)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.dense_parameters == sum(p.numel() for p in Net().parameters())
    assert found.dense_bytes == 4 * found.dense_parameters
    shared = fedpara.split(model).shared.values()
    assert found.shared_bytes == sum(4 * prod(value.shape) for value in shared)
