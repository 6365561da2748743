"""Every dtype that a payload carries, and names that cannot be meant."""

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError, ConversionError, FedParaConfig, MismatchError, PayloadError
from fedpara_plugins.cli.doctor import check_model
from fedpara_plugins.cli.export import dense_from
from fedpara_plugins.cli.plan import plan_traffic
from fedpara_plugins.models import load_factors, save_dense, save_factors
from fedpara_plugins.models.checkpoint_files import read_checkpoint, write_state
from fedpara_plugins.stages.dtypes import DTYPES

DTYPE_NAMES = sorted(DTYPES)


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        torch.manual_seed(0)
        real = dtype.is_floating_point or dtype.is_complex
        value = torch.randn(40, 40) if real else torch.randint(0, 2, (40, 40))
        self.register_buffer("table", value.to(dtype))
        self.vector = nn.Parameter(value[0].to(dtype), requires_grad=False)


def same(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("codec", ["none", "lossless", "int8", "small"])
@pytest.mark.parametrize("method", ["none", "fedpara"])
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_plan_takes_every_dtype(dtype, method, codec):
    config = FedParaConfig(method=method, codec=codec)
    plan = plan_traffic(Net(DTYPES[dtype]), config)
    assert plan.messages[-1].size > 0
    assert "table" not in str(plan) or plan.report.dense_bytes


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_export_takes_every_dtype(dtype, tmp_path):
    plain = Net(DTYPES[dtype])
    model = fedpara.convert(Net(DTYPES[dtype]), gamma=0.2)
    fedpara.to_dense(model)
    save_factors(model, tmp_path / "f.safetensors")
    load_factors(model, tmp_path / "f.safetensors")
    torch.save(model.state_dict(), tmp_path / "f.pt")
    dense, _ = dense_from(read_checkpoint(tmp_path / "f.safetensors"))
    again, _ = dense_from(
        read_checkpoint(tmp_path / "f.pt"),
        Net(DTYPES[dtype]),
        FedParaConfig(method="fedpara", gamma=0.2),
    )
    for found in (dense, again):
        assert same(found["table"], plain.table)
        assert same(found["vector"], plain.vector.detach())
    save_dense(tmp_path / "d.safetensors", dense, model="a model", method="fedpara")
    assert same(read_checkpoint(tmp_path / "d.safetensors").tensors["table"], plain.table)


def test_a_float8_weight_is_refused_with_its_name_and_may_be_left_out():
    model = nn.Sequential(nn.Linear(64, 64).to(torch.float8_e4m3fn), nn.Linear(64, 64))
    with pytest.raises(ConversionError, match=r"'0'.*float8_e4m3fn.*exclude"):
        plan_traffic(model, FedParaConfig(method="fedpara", codec="small"))
    plan_traffic(model, FedParaConfig(method="fedpara", codec="small", exclude=("0",)))


def test_a_dtype_that_no_file_holds_is_named(tmp_path):
    model = fedpara.convert(Net(torch.complex128), gamma=0.2)
    with pytest.raises(PayloadError, match=r"'(vector|table)' is of torch.complex128.*float64"):
        save_factors(model, tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())


class Reserved(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)
        self.register_buffer("__metadata__", torch.ones(3))


def test_a_tensor_with_the_name_that_safetensors_keeps(tmp_path):
    """Its file could be written, and never be read."""
    words = r"'__metadata__'.*safetensors.*Rename"
    with pytest.raises(PayloadError, match=words):
        save_factors(fedpara.convert(Reserved(), gamma=0.2), tmp_path / "f.safetensors")
    assert not list(tmp_path.iterdir())
    for codec in ("none", "small"):
        with pytest.raises(PayloadError, match=words):
            plan_traffic(Reserved(), FedParaConfig(method="fedpara", codec=codec))
    found = check_model(Reserved(), FedParaConfig(method="fedpara"))
    assert any(f.level == "attention" and f.subject == "__metadata__" for f in found)


PREFIXES = ["module.", "_orig_mod.", "module._orig_mod."]


@pytest.fixture(params=PREFIXES)
def wrapped(request, tmp_path):
    """A model, its state under a wrapper's names, in a file too, and words of the error."""
    model = fedpara.convert(nn.Sequential(nn.Linear(64, 64)), gamma=0.2)
    state = {request.param + name: value for name, value in model.state_dict().items()}
    write_state(tmp_path / "f.safetensors", state, {})
    kind = "DataParallel" if request.param.startswith("module") else "torch.compile"
    inside = request.param.rstrip(".")
    return model, state, tmp_path / "f.safetensors", f"{kind}.*model\\.{inside}\\.state_dict"


def test_a_state_under_a_wrapper_s_names_is_recognised(wrapped):
    model, state, file, words = wrapped
    spec = fedpara.ModelSpec.of(model)
    with pytest.raises(PayloadError, match=words):
        spec.dense_state(state)
    with pytest.raises(PayloadError, match=words):
        fedpara.merge(spec, state, {})
    with pytest.raises(MismatchError, match=words):
        load_factors(model, file)
    config = FedParaConfig(method="fedpara", gamma=0.2)
    with pytest.raises(MismatchError, match=words):
        dense_from(read_checkpoint(file), nn.Sequential(nn.Linear(64, 64)), config)


def test_a_described_checkpoint_of_a_wrapped_model_is_recognised(tmp_path):
    model = fedpara.convert(nn.Sequential(nn.Linear(64, 64)), gamma=0.2)
    save_factors(nn.DataParallel(model), tmp_path / "f.safetensors")
    with pytest.raises(MismatchError, match=r"DataParallel.*model\.module\.state_dict"):
        load_factors(model, tmp_path / "f.safetensors")
    with pytest.raises(MismatchError, match=r"DataParallel.*model\.module\.state_dict"):
        dense_from(read_checkpoint(tmp_path / "f.safetensors"), nn.Sequential(nn.Linear(64, 64)))


def test_a_model_that_has_an_attribute_called_module_is_none(tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(64, 64)

    model = fedpara.convert(Outer(), gamma=0.2)
    save_factors(model, tmp_path / "f.safetensors")
    load_factors(model, tmp_path / "f.safetensors")
    dense, _ = dense_from(read_checkpoint(tmp_path / "f.safetensors"), Outer())
    Outer().load_state_dict(dense, strict=True)


@pytest.mark.parametrize("option", ["codec", "uplink_codec", "downlink_codec"])
@pytest.mark.parametrize("method", ["none", "fedpara"])
def test_a_misspelt_codec_is_refused_at_the_conversion(option, method):
    with pytest.raises(ConfigError, match=rf"'{option}'.*'smal'.*did you mean 'small'"):
        fedpara.convert(nn.Linear(64, 64), method=method, **{option: "smal"})
    config = FedParaConfig(method=method, **{option: "delta+quantize"})
    with pytest.raises(ConfigError, match=r"'quantize'.*did you mean 'quantise'"):
        fedpara.convert(nn.Linear(64, 64), config)
    fedpara.convert(nn.Linear(64, 64), method=method, **{option: "delta+quantise:rms=2"})
