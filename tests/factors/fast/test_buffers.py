"""Memory of composed weights: used again when it is free, and never while anything refers to it."""

import gc

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.factors.fast import buffers

LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def _none_left():
    buffers.clear()
    yield
    buffers.clear()


def filled(value):
    tensor = buffers.empty(LIKE, 512, 600)
    return tensor.fill_(value)


def test_memory_that_came_back_is_used_again():
    first = filled(1)
    address = first.data_ptr()
    del first
    assert filled(2).data_ptr() == address


@pytest.mark.parametrize("keep", [lambda t: t.view(-1)[5:], lambda t: t.detach(), lambda t: t.T])
def test_not_while_a_view_lives(keep):
    first = filled(1)
    view = keep(first)
    del first
    other = filled(2)
    assert (view == 1).all()
    del view
    address = other.data_ptr()
    assert filled(3).data_ptr() != address


def test_not_while_a_graph_lives():
    first = filled(1)
    factor = torch.ones(512, 600, requires_grad=True)
    product = (factor * first).sum()
    del first
    filled(2)
    product.backward()
    assert (factor.grad == 1).all()


def test_not_while_numpy_looks_at_it():
    array = filled(1).numpy()
    gc.collect()
    filled(2)
    assert (array == 1).all()


def test_small_tensors_and_other_devices_are_torch_s_own():
    assert buffers.empty(LIKE, 3, 5).shape == (3, 5)
    assert buffers.empty(LIKE.to("meta"), 512, 600).device.type == "meta"
    assert buffers.empty(LIKE.double(), 512, 600).dtype == torch.float64


def test_two_forwards_before_their_backwards():
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(600, 512), method="fedpara", rank=8)
    inputs = [torch.randn(200, 600) for _ in range(2)]

    def gradients(many):
        losses = [layer(x).square().sum() for x in many]
        return [torch.autograd.grad(loss, [layer.x1, layer.y2]) for loss in losses]

    together, alone = gradients(inputs), [gradients([x])[0] for x in inputs]
    for one, other in zip(together, alone, strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine, theirs)


def test_a_weight_that_is_kept_outlives_training_steps():
    layer = fedpara.convert(nn.Linear(600, 512), method="fedpara", rank=8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    kept = layer.weight.detach()
    before = kept.clone()
    for _ in range(3):
        layer(torch.randn(200, 600)).square().mean().backward()
        optimizer.step()
    assert torch.equal(kept, before)
    assert not torch.equal(layer.weight, before)


def test_memory_is_given_back_when_asked():
    address = filled(1).data_ptr()
    buffers.clear()
    holder = torch.empty(512, 600)  # may take its place
    second = filled(2)
    assert (second == 2).all()
    assert second.data_ptr() != address or holder.data_ptr() != address
