"""The default dtype and device of the process change nothing that two sides must agree on."""

import contextlib

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CONTEXTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


def nets():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Conv1d(32, 32, 3), nn.LSTM(64, 32))


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_all_factors_are_drawn_alike(context, method):
    expected = fedpara.convert(nets(), method=method, gamma=0.3)
    model = nets()
    with CONTEXTS[context]():
        fedpara.convert(model, method=method, gamma=0.3)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_factors_have_the_dtype_of_the_weight():
    with default_dtype(torch.float64):
        model = fedpara.convert(nets(), gamma=0.3)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert model[0](torch.randn(2, 64)).dtype == torch.float64
