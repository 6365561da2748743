"""Tools of torch's that look at operations, or run around them: as with a dense model.

Linear layers take all their ways, by the number of inputs; `tox run -e kernels` adds theirs.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import fedpara_plugins as fedpara
from fedpara_plugins import to_dense

MODELS = {
    "linear, few inputs": (lambda: nn.Linear(64, 96), (4, 64)),
    "linear, more inputs": (lambda: nn.Linear(64, 96), (200, 64)),
    "linear by blocks": (lambda: nn.Linear(64, 96), (300, 64)),
    "conv": (lambda: nn.Conv2d(24, 32, 3), (2, 24, 6, 5)),
    "gru": (lambda: nn.GRU(24, 32), (5, 3, 24)),
    "attention": (lambda: SelfAttention(), (2, 5, 32)),
}


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)


class First(nn.Module):
    """The first of several outputs."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        output = self.model(x)
        return output if isinstance(output, torch.Tensor) else output[0]


@pytest.fixture(params=MODELS)
def case(request):
    torch.manual_seed(0)
    build, shape = MODELS[request.param]
    recompute = request.param == "linear by blocks" or None
    model = First(
        fedpara.convert(build(), method="pfedpara", gamma=0.2, min_size=0, recompute=recompute)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model, torch.randn(shape)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def close(mine, theirs):
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_fake_tensors(case):
    model, x = case
    expected = model(x).shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = model(x)
        output.sum().backward()
    assert output.shape == expected


def test_operations_are_counted(case):
    """A step's arithmetic is at least the dense one's: nothing is hidden from the counter."""
    model, x = case
    with torch.backends.mkldnn.flags(enabled=False):
        counts = []
        for counted in (to_dense(model), model):
            with FlopCounterMode(display=False) as counter:
                counted(x).sum().backward()
            counts.append(counter.get_total_flops())
    assert counts[1] > counts[0] > 0


def test_a_graph_of_operations(case):
    model, x = case
    with torch.no_grad():
        torch.testing.assert_close(make_fx(model)(x)(x), model(x), rtol=1e-4, atol=1e-5)


def test_selective_checkpoints(case):
    model, x = case
    if isinstance(model.model, nn.GRU):
        pytest.skip("torch's own GRU gets other gradients from a selective checkpoint than without")
    expected = gradients(model, model(x).square().sum())
    held = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    contexts = partial(create_selective_checkpoint_contexts, held)
    output = checkpoint(model, x, use_reentrant=False, context_fn=contexts)
    output.square().sum().backward()
    close([parameter.grad for parameter in model.parameters()], expected)


def test_saved_tensors_come_back_in_another_layout(case):
    model, x = case
    expected = gradients(model, model(x).square().sum())

    def pack(tensor):
        return tensor.mT.contiguous() if tensor.dim() == 2 else tensor

    def unpack(tensor):
        return tensor.mT if tensor.dim() == 2 else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = model(x).square().sum()
    close(gradients(model, loss), expected)


@pytest.mark.parametrize("again", [False, True])
def test_many_gradients_at_once(case, again):
    model, x = case
    if isinstance(model.model, nn.GRU):
        pytest.skip("torch's own GRU has no rule for a batch of gradients")
    output, wanted = model(x), list(model.parameters())
    vectors = torch.randn(3, *output.shape)
    together = torch.autograd.grad(
        output, wanted, vectors, is_grads_batched=True, retain_graph=True, create_graph=again
    )
    for i, vector in enumerate(vectors):
        alone = torch.autograd.grad(output, wanted, vector, retain_graph=True)
        close([gradient[i] for gradient in together], alone)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("inputs", [4, 200])
def test_one_factor_in_two_places(again, inputs):
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(64, 96, bias=False), method="fedpara", gamma=0.2)
    apart, x = copy.deepcopy(layer), torch.randn(inputs, 64)
    with torch.no_grad():
        apart.x2.copy_(apart.x1)
    layer.x2 = layer.x1
    tied = [layer.x1, layer.y1, layer.y2]
    mine = torch.autograd.grad(layer(x).square().sum(), tied, create_graph=again)
    each = [apart.x1, apart.x2, apart.y1, apart.y2]
    x1, x2, y1, y2 = torch.autograd.grad(apart(x).square().sum(), each)
    torch.testing.assert_close(list(mine), [x1 + x2, y1, y2], rtol=1e-4, atol=1e-3)


def test_a_frozen_layer_does_not_hold_its_inputs():
    layer = fedpara.convert(nn.Linear(64, 96), method="fedpara", gamma=0.2).requires_grad_(False)
    for count in (4, 200):
        given = torch.randn(count, 64, requires_grad=True)
        x = given * 1
        output = layer(x)
        x.mul_(2)  # a dense layer does not mind
        (mine,) = torch.autograd.grad(output.sum(), given)
        torch.testing.assert_close(mine, layer.weight.sum(0).expand(count, 64))


@pytest.mark.parametrize("count", [4, 200])
def test_inputs_that_are_no_ordinary_rows(count):
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(64, 96), method="fedpara", gamma=0.2)
    dense, x = to_dense(layer), torch.randn(count, 64).relu()
    for given in (x.to_sparse(), x.to_sparse_csr()):
        torch.testing.assert_close(layer(given), dense(given), rtol=1e-4, atol=1e-5)
    nested = torch.nested.nested_tensor([x[:1], x[1:]])
    for mine, theirs in zip(layer(nested).unbind(), dense(nested).unbind(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for model in (layer, dense):
        with pytest.raises(RuntimeError, match="at least 1D"):
            model(torch.tensor(1.0))
