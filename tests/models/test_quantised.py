"""Models with layers of bitsandbytes and torchao, whose frozen weights have 4 or 8 bits."""

import copy

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConversionError
from fedpara_plugins.errors import NothingToConvertError
from fedpara_plugins.layers import FactorisedLayer

OPTIONS = {"base": "frozen", "rank": 4, "min_size": 0}
METHODS = ("lowrank", "fedpara", "pfedpara")


def net(first):
    torch.manual_seed(0)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def by_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: tox run -e core-models")
    torch.manual_seed(0)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    model = net(layer).to("cpu")  # which quantises
    model[0].requires_grad_(False)
    assert not model[0].weight.is_floating_point()
    return model


def by_torchao():
    torchao = pytest.importorskip(
        "torchao.quantization", reason="needs torchao: tox run -e core-models"
    )
    model = net(nn.Linear(64, 64))
    torchao.quantize_(model[0], torchao.Int8WeightOnlyConfig())
    model[0].requires_grad_(False)
    assert type(model[0].weight) is not nn.Parameter
    return model


MODELS = {
    "bitsandbytes, 4 bits": (lambda: by_bitsandbytes(4), {}),
    "bitsandbytes, 8 bits": (lambda: by_bitsandbytes(8), {}),
    "torchao, 8 bits": (by_torchao, {"exclude": ["0"]}),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", MODELS)
def test_quantised_layers_stay_and_others_get_an_update(kind, method):
    build, options = MODELS[kind]
    dense = build()
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    before = dense(x)
    model = fedpara.convert(copy.deepcopy(dense), method=method, **OPTIONS, **options)
    assert [n for n, m in model.named_modules() if isinstance(m, FactorisedLayer)] == ["2", "4"]
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert model(x).square().mean() < before.square().mean()
    exported = fedpara.to_dense(model)
    assert type(exported[0]) is type(dense[0])
    torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_report_says_what_to_do_with_a_quantised_layer(bits):
    model = by_bitsandbytes(bits)
    text = str(fedpara.report(fedpara.convert(copy.deepcopy(model), method="lowrank", **OPTIONS)))
    assert f"holds a quantised weight ({type(model[0].weight).__name__} of" in text
    with pytest.raises(NothingToConvertError, match=r"quantised weight .* adapt it with PEFT"):
        fedpara.convert(model[0], method="lowrank", **OPTIONS)


def test_a_weight_of_torchao_is_refused_by_name():
    with pytest.raises(ConversionError, match=r"'0': weight is a Int8Tensor, .*exclude the layer"):
        fedpara.convert(by_torchao(), method="lowrank", **OPTIONS)
