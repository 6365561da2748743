"""What torch lets one do with a module, for each kind, after a training step.

The whole of it, for a model of several kinds, is in ``tests/layers/test_ordinary_modules.py``; here
is what could depend on the kind.
"""

import copy

import cloudpickle
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import fedpara_plugins as fedpara
from fedpara_plugins.layers import FactorisedLayer


class FirstOutput(nn.Module):
    """Of a layer that gives several outputs; attention attends to its own input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        inputs = (x, x, x) if isinstance(self.layer, nn.MultiheadAttention) else (x,)
        return self.layer(*inputs)[0]


TOKENS = torch.tensor([[1, 5, 99, 5], [3, 3, 0, 7], [5, 5, 5, 5]])

CASES = {
    "linear": lambda: (nn.Linear(48, 64), torch.randn(3, 48)),
    "conv1d": lambda: (nn.Conv1d(32, 48, 3, padding=1), torch.randn(3, 32, 7)),
    "conv2d": lambda: (nn.Conv2d(32, 48, 3, groups=2), torch.randn(3, 32, 5, 6)),
    "conv3d": lambda: (nn.Conv3d(32, 48, 2), torch.randn(3, 32, 3, 4, 3)),
    "conv_transpose1d": lambda: (nn.ConvTranspose1d(32, 48, 3), torch.randn(3, 32, 7)),
    "conv_transpose2d": lambda: (nn.ConvTranspose2d(32, 48, 3), torch.randn(3, 32, 4, 5)),
    "conv_transpose3d": lambda: (nn.ConvTranspose3d(32, 48, 2), torch.randn(3, 32, 2, 3, 2)),
    "embedding": lambda: (nn.Embedding(120, 48, padding_idx=5), TOKENS),
    "embedding_bag": lambda: (nn.EmbeddingBag(120, 48), TOKENS),
    "lstm": lambda: (FirstOutput(nn.LSTM(32, 40, bidirectional=True)), torch.randn(5, 3, 32)),
    "gru": lambda: (FirstOutput(nn.GRU(32, 40, bias=False)), torch.randn(5, 3, 32)),
    "attention": lambda: (FirstOutput(nn.MultiheadAttention(48, 4)), torch.randn(5, 3, 48)),
}

RECURRENT = ("lstm", "gru")


@pytest.fixture(params=CASES)
def kind(request):
    return request.param


@pytest.fixture
def trained(kind):
    """A converted layer after a step, and inputs for it."""
    torch.manual_seed(0)
    dense, inputs = CASES[kind]()
    model = fedpara.convert(dense, method="fedpara", gamma=0.3)
    assert kind in [layer.kind for layer in model.modules() if isinstance(layer, FactorisedLayer)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(inputs).square().mean().backward()
    optimizer.step()
    model.zero_grad()
    return model, inputs


def test_cloudpickle(trained):
    model, inputs = trained
    other = cloudpickle.loads(cloudpickle.dumps(model))
    torch.testing.assert_close(other(inputs), model(inputs))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, for embedding bags
def test_stacked_clients(trained, kind):
    model, inputs = trained
    clients = [copy.deepcopy(model) for _ in range(3)]
    for i, client in enumerate(clients):
        for parameter in client.parameters():
            parameter.data.mul_(1 + i / 4)
    state = stack_module_state(clients)

    def forward(parameters, buffers):
        return functional_call(model, (parameters, buffers), (inputs,))

    def one_by_one(parameters, buffers):
        each = [{k: v[i] for k, v in parameters.items()} for i in range(len(clients))]
        return torch.stack([forward(own, buffers) for own in each])

    # torch has no batching rule for its recurrent layers, factorised or not.
    mapped = one_by_one if kind in RECURRENT else vmap(forward)
    expected = torch.stack([client(inputs) for client in clients])
    torch.testing.assert_close(mapped(*state), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(trained, dtype):
    model, inputs = trained
    expected = model(inputs)
    half = inputs.to(dtype) if inputs.is_floating_point() else inputs
    _skip_what_torch_cannot(copy.deepcopy(model).to(dtype), half)
    output = copy.deepcopy(model).to(dtype)(half)
    assert output.dtype == dtype
    assert (output.float() - expected).norm() / expected.norm() < 0.05


def _skip_what_torch_cannot(model, inputs):
    """Its LSTM, say, trains in bfloat16 only on a CPU with AVX-512."""
    try:
        fedpara.to_dense(model).train()(inputs)
    except RuntimeError as error:
        pytest.skip(f"torch's own layer does not run here: {error}")


def test_autocast(trained):
    model, inputs = trained
    expected = model(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _skip_what_torch_cannot(model, inputs)
        output = model(inputs)
    assert (output.float() - expected).norm() / expected.norm() < 0.05
    output.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_gradients_enabled_in_inference_mode(trained):
    model, inputs = trained
    expected = model(inputs)
    with torch.inference_mode(), torch.enable_grad():  # torch records nothing there
        output = model(inputs)
    assert output.grad_fn is None
    torch.testing.assert_close(output, expected)


def test_to_dense_under_autocast_gives_the_weights_that_it_gives_elsewhere(trained):
    model, _ = trained
    expected = fedpara.to_dense(model).state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fedpara.to_dense(model).state_dict()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradient_checkpointing(trained):
    model, inputs = trained
    model(inputs).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    checkpoint(model, inputs, use_reentrant=False).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_export(trained):
    model, inputs = trained
    program = torch.export.export(model.eval(), (inputs,))
    torch.testing.assert_close(program.module()(inputs), model(inputs))


def test_traced_by_the_compiler(trained, kind):
    """One graph without a break; the code generator itself needs a C++ compiler.

    Around recurrent layers torch breaks the graph and runs them as they are, factorised or not.
    """
    model, inputs = trained
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=kind not in RECURRENT, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), model(inputs))


def test_traced_by_the_compiler_before_any_other_use(kind):
    """What a layer finds out once, at its first use, must be nothing that cannot be traced."""
    torch.manual_seed(0)
    dense, inputs = CASES[kind]()
    model = fedpara.convert(dense, method="fedpara", gamma=0.3)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=kind not in RECURRENT, backend="aot_eager")
    torch.testing.assert_close(compiled(inputs), copy.deepcopy(model)(inputs))
