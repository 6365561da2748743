"""Converted models under torch's other tools: meta device, inference mode, torch.fx, writes."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

import fedpara_plugins as fedpara
from fedpara_plugins import ConversionError


class First(nn.Module):
    """The first of several outputs."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x, x, x, need_weights=False)[0]


def tokens():
    return torch.randint(1, 60, (4, 7))


MODELS = {
    "linear": (lambda: nn.Linear(32, 40), lambda: torch.randn(100, 32)),
    "few inputs": (lambda: nn.Linear(32, 40), lambda: torch.randn(3, 32)),
    "conv": (lambda: nn.Conv2d(16, 24, 3), lambda: torch.randn(2, 16, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(16, 24, 3), lambda: torch.randn(2, 16, 5)),
    "embedding": (lambda: nn.Embedding(60, 16, padding_idx=0), tokens),
    "bag": (lambda: nn.EmbeddingBag(60, 16), tokens),
    "lstm": (lambda: First(nn.LSTM(16, 24)), lambda: torch.randn(5, 3, 16)),
    "gru": (lambda: First(nn.GRU(16, 24)), lambda: torch.randn(5, 3, 16)),
    "attention": (SelfAttention, lambda: torch.randn(2, 5, 32)),
}


@pytest.fixture(params=["fedpara", "pfedpara"])
def method(request):
    return request.param


@pytest.fixture(params=MODELS)
def case(request, method):
    """A function that converts a fresh model, and inputs of it."""
    build, inputs = MODELS[request.param]
    torch.manual_seed(0)

    def converted():
        model = nn.Sequential(build(), nn.Dropout(0.0))
        return fedpara.convert(model, method=method, gamma=0.2, min_size=0)

    return converted, inputs()


# The meta device


def test_a_model_moves_to_the_meta_device(case):
    converted, x = case
    model = converted()
    shape = model(x).shape
    meta = copy.deepcopy(model).to("meta")
    assert meta(x.to("meta")).shape == shape
    dense = fedpara.to_dense(meta)
    assert dense(x.to("meta")).shape == shape
    assert all(p.is_meta for p in dense.parameters())


def test_conversion_on_the_meta_device_gives_the_same_model_without_values(case):
    converted, x = case
    expected = converted()
    with torch.device("meta"):
        model = converted()
        assert model(x.to("meta")).shape == expected(x).shape
        spec = fedpara.ModelSpec.of(model)
        spec.check_equal(fedpara.ModelSpec.of(expected), here="meta", there="cpu")
        assert fedpara.report(model) == fedpara.report(expected)
        assert fedpara.to_dense(model)(x.to("meta")).is_meta
    assert all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu").load_state_dict(expected.state_dict())
    torch.testing.assert_close(model(x), expected(x))


def test_values_are_real_where_the_model_s_are():
    model = nn.Sequential(nn.Linear(32, 40))
    for init in ("random", "seeded", "fit"):
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fedpara.convert(copy.deepcopy(model), gamma=0.2, init=init)
        assert {p.device.type for p in found.parameters()} == {"cpu"}


def test_a_fit_without_values_is_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    with pytest.raises(ConversionError, match=r"'0'.*weight.*meta device.*init='fit'"):
        fedpara.convert(model, gamma=0.2, init="fit")


# Inference mode


def test_everything_runs_in_inference_mode(case):
    converted, x = case
    model = converted()
    expected = model(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(fedpara.to_dense(model)(x), expected, rtol=1e-3, atol=1e-4)
        with fedpara.composed_once(model):
            torch.testing.assert_close(model(x), expected)
        inside = converted()
        output = inside(x)
        fedpara.report(inside)
        torch.testing.assert_close(fedpara.to_dense(inside)(x), output, rtol=1e-3, atol=1e-4)
    model(x).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(inside(x), output.clone())


# torch.fx


def attributes(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


def test_a_symbolic_trace_has_live_weights_and_leaves_the_model_alone(case):
    converted, x = case
    model = converted().eval()
    before, names = attributes(model), list(model.state_dict())
    traced = torch.fx.symbolic_trace(model)
    assert attributes(model) == before
    assert list(model.state_dict()) == list(traced.state_dict()) == names
    for _ in range(2):
        torch.testing.assert_close(traced(x), model(x))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
    traced(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


class Tied(nn.Module):
    """A model whose forward takes the weight itself."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return functional.linear(x, self.layer.weight.flatten(1))


@pytest.mark.parametrize("layer", [nn.Linear(32, 40), nn.Conv2d(16, 24, 3), nn.Embedding(60, 16)])
def test_a_weight_that_the_forward_takes_is_composed_in_the_graph(layer, method):
    model = fedpara.convert(Tied(layer), method=method, gamma=0.2, min_size=0)
    before = attributes(model)
    traced = torch.fx.symbolic_trace(model)
    assert attributes(model) == before
    x = torch.randn(3, model.layer.weight.flatten(1).shape[1])
    with torch.no_grad():
        model.layer.x1.mul_(1.5)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("name", ["linear", "few inputs", "conv", "embedding"])
def test_a_single_layer_is_composed_in_the_graph(name, method):
    build, inputs = MODELS[name]
    layer, x = fedpara.convert(build(), method=method, gamma=0.2, min_size=0), inputs()
    before = attributes(layer)
    traced = torch.fx.symbolic_trace(layer)
    assert attributes(layer) == before
    with torch.no_grad():
        layer.x1.mul_(1.5)
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-4, atol=1e-5)


def test_a_traced_model_is_dense_again_as_the_model_is(case):
    converted, x = case
    model = converted().eval()
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(fedpara.to_dense(traced)(x), model(x), rtol=1e-3, atol=1e-4)


# Writes


WEIGHTS = {
    "linear": (lambda: nn.Linear(32, 40), "weight"),
    "conv": (lambda: nn.Conv2d(16, 24, 3), "weight"),
    "embedding": (lambda: nn.Embedding(60, 16), "weight"),
    "lstm": (lambda: nn.LSTM(16, 24), "weight_hh_l0"),
    "attention": (lambda: nn.MultiheadAttention(32, 4), "in_proj_weight"),
}
INITS = {
    "uniform": nn.init.uniform_,
    "normal": nn.init.normal_,
    "trunc normal": nn.init.trunc_normal_,
    "constant": lambda w: nn.init.constant_(w, 0.5),
    "zeros": nn.init.zeros_,
    "ones": nn.init.ones_,
    "xavier": nn.init.xavier_uniform_,
    "kaiming": nn.init.kaiming_normal_,
    "orthogonal": nn.init.orthogonal_,
}


def add_in_place(weight):
    weight += 1


def set_data(weight):
    weight.data = torch.zeros_like(weight)


def add_to_data(weight):
    weight.data += 1


WRITES = {
    **INITS,
    "+=": add_in_place,
    "data =": set_data,
    "data +=": add_to_data,
    "data.copy_": lambda w: w.data.copy_(torch.zeros_like(w)),
    "data.normal_": lambda w: w.data.normal_(),
    "data.data.zero_": lambda w: w.data.data.zero_(),
    "copy_": lambda w: w.copy_(torch.zeros_like(w)),
    "mul_": lambda w: w.mul_(2),
    "item": lambda w: w.__setitem__(0, 1.0),
    "data item": lambda w: w.data.__setitem__(0, 1.0),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_write_to_a_composed_weight_is_refused(kind, write, grad):
    build, name = WEIGHTS[kind]
    layer = fedpara.convert(build(), method="fedpara", gamma=0.2, min_size=0)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.set_grad_enabled(grad), pytest.raises(ConversionError, match=f"{name} is composed"):
        WRITES[write](getattr(layer, name))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_weights_that_stay_dense_are_written_to_as_ever():
    layer = fedpara.convert(nn.LSTM(4, 24), method="fedpara", gamma=0.2)
    assert "weight_ih_l0" not in layer.plans
    nn.init.zeros_(layer.weight_ih_l0)
    assert not layer.weight_ih_l0.any()
    nn.init.ones_(layer.bias_ih_l0)
    assert bool(layer.bias_ih_l0.all())


def test_results_and_copies_of_a_weight_are_plain_tensors():
    layer = fedpara.convert(nn.Linear(32, 40), method="fedpara", gamma=0.2)
    weight = layer.weight
    for result in (weight * 2, weight.detach(), weight.clone(), weight.T, weight[:3]):
        assert type(result) is torch.Tensor
    copied = weight.detach().clone()
    copied.zero_()
    stream = io.BytesIO()
    torch.save(weight, stream)
    stream.seek(0)
    loaded = torch.load(stream, weights_only=True)
    assert type(loaded) is torch.Tensor
    torch.testing.assert_close(loaded, weight.detach())
    with torch.no_grad():
        assert type(copy.deepcopy(layer.weight)) is torch.Tensor
    weight.retain_grad()
    weight.square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


class LoraLinear(nn.Module):
    """What PEFT puts in place of a linear layer, with the two ways in which it merges (0.17)."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.delta = torch.full((40, 32), 0.1)

    def merge(self, safe_merge):
        base_layer = self.base_layer
        if safe_merge:
            orig_weight = base_layer.weight.data.clone()
            orig_weight += self.delta
            base_layer.weight.data = orig_weight
        else:
            base_layer.weight.data += self.delta


@pytest.mark.parametrize("safe_merge", [False, True])
def test_an_adapter_over_a_converted_layer_is_merged_or_refused(safe_merge):
    dense = LoraLinear(nn.Linear(32, 40))
    before = dense.base_layer.weight.detach().clone()
    dense.merge(safe_merge)
    torch.testing.assert_close(dense.base_layer.weight.detach(), before + 0.1)
    converted = LoraLinear(fedpara.convert(nn.Linear(32, 40), gamma=0.2))
    with pytest.raises(ConversionError, match=r"to_dense\(\)"):
        converted.merge(safe_merge)


def test_a_layer_s_own_weight_may_be_assigned_and_none_removed():
    """PEFT assigns a layer its own weight when it takes an adapter away."""
    for build, name in WEIGHTS.values():
        layer = fedpara.convert(build(), method="fedpara", gamma=0.2, min_size=0)
        before = {k: v.clone() for k, v in layer.state_dict().items()}
        setattr(layer, name, getattr(layer, name))
        for other in (2 * getattr(layer, name), nn.Parameter(getattr(layer, name).detach())):
            with pytest.raises(ConversionError, match=f"{name} of this .* cannot be assigned"):
                setattr(layer, name, other)
        with pytest.raises(ConversionError, match=f"{name} of this .* cannot be removed"):
            delattr(layer, name)
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_another_layer_of_a_converted_layer_s_class_is_dense(kind):
    dense = WEIGHTS[kind][0]()
    layer = fedpara.convert(copy.deepcopy(dense), method="fedpara", gamma=0.2, min_size=0)
    sizes = {"linear": (5, 6), "conv": (5, 6, 3), "embedding": (5, 6)}[kind]
    assert type(type(layer)(*sizes)) is type(dense)
