"""Everything private of torch that the project uses exists, and means what it is used for."""

import ast
import copy
import inspect
import pickle
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fedpara_plugins
from fedpara_plugins.layers import (
    FactorisedLinear,
    FactorisedLSTM,
    FactorisedMultiheadAttention,
)
from fedpara_plugins.support import torch_seams as seams

CORE = Path(fedpara_plugins.__file__).parent
ROOMS = ("cli", "factors", "layers", "models", "support", "testing", "training")


# Autograd and modes


def test_tracing_is_seen():
    seen = []

    def function(x):
        seen.append(seams.is_tracing())
        return x + 1

    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert seen == [True]
    assert not seams.is_tracing()


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.vmap(f)(torch.ones(3, 2)),
        lambda f: torch.func.grad(lambda x: f(x).sum())(torch.ones(2)),
        lambda f: torch.func.jvp(f, (torch.ones(2),), (torch.ones(2),)),
    ],
    ids=["vmap", "grad", "jvp"],
)
def test_transforms_are_seen(transform):
    seen = []

    def function(x):
        seen.append(seams.are_functorch_transforms_active())
        return x * x

    transform(function)
    assert seen == [True]
    assert not seams.are_functorch_transforms_active()


def test_modes_of_dispatch_are_counted():
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert seams.count_dispatch_modes() == 0
    with Mode():
        assert seams.count_dispatch_modes() == 1
        with Mode():
            assert seams.count_dispatch_modes() == 2
    assert seams.count_dispatch_modes() == 0


def test_forward_mode_is_seen():
    assert not seams.in_forward_mode()
    with forward_ad.dual_level():
        assert seams.in_forward_mode()
    assert not seams.in_forward_mode()


def test_gradients_taken_at_once_are_seen():
    seen = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, gradient):
            seen.append(seams.is_legacy_batchedtensor(gradient))
            return 2 * gradient * ctx.saved_tensors[0]

    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad(Square.apply(x), x, torch.ones(2))
    torch.autograd.grad(Square.apply(x), x, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True]


def test_hooks_on_saved_tensors_are_seen_and_can_be_forbidden():
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        assert not seams.saved_tensors_hooks_are_enabled()
        with pytest.raises(RuntimeError, match="none here"):
            torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t).__enter__()
    seen = []

    def function(x):
        seen.append(seams.saved_tensors_hooks_are_enabled())
        return x * x

    x = torch.ones(2, requires_grad=True)
    checkpoint(function, x, use_reentrant=False).sum().backward()
    assert seen == [True, True]


def test_the_derivative_of_tanh():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(5, dtype=torch.float64)
    expected = torch.autograd.grad(x.tanh(), x, gradient)[0]
    torch.testing.assert_close(seams.tanh_backward(gradient, x.detach().tanh()), expected)


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_tensors_are_seen(register):
    tensor = torch.ones(2, requires_grad=True)
    assert not seams.has_hooks(tensor)
    handle = getattr(tensor, register)(lambda *_: None)
    assert seams.has_hooks(tensor)
    handle.remove()
    assert not seams.has_hooks(tensor)


def test_versions_count_changes_in_place():
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1
    tensor.data.add_(1)  # which `composed_once` cannot notice, and says so
    assert tensor._version == before + 1


# Modules


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_parameter("bias", None)
        self.register_buffer("kept", torch.ones(3))
        self.register_buffer("dropped", torch.ones(3), persistent=False)
        self.first = self.second = nn.Linear(2, 2)
        self.note = "mine"


def test_parameters_buffers_and_children_by_attribute():
    owner = Owner()
    assert list(seams.own_parameters(owner)) == ["weight", "bias"]
    assert seams.own_parameters(owner)["weight"] is owner.weight
    assert seams.own_parameters(owner) is owner._parameters
    assert list(seams.own_buffers(owner)) == ["kept", "dropped"]
    assert list(seams.own_children(owner)) == ["first", "second"]
    assert list(seams.persistent_buffers(owner)) == ["kept"]
    assert "dropped" not in owner.state_dict()


def test_what_is_put_among_parameters_is_one():
    owner = Owner()
    seams.own_parameters(owner)["added"] = nn.Parameter(torch.ones(1))
    assert "added" in dict(owner.named_parameters())


def test_a_module_is_its_attributes():
    dense = nn.Linear(3, 2)
    seen = []
    dense.register_forward_hook(lambda *_: seen.append(1))
    dense.note = "mine"
    other = seams.assembled_module(
        nn.LazyLinear, seams.attributes_of(dense), seams.own_parameters(dense)
    )
    assert type(other) is nn.LazyLinear
    assert other.weight is dense.weight
    assert (other.note, other.in_features) == ("mine", 3)
    assert list(other.state_dict()) == ["weight", "bias"]
    nn.Linear.forward(other, torch.ones(1, 3))
    nn.Module.__call__(other, torch.ones(1, 3))
    assert seen == [1]


def test_the_compiled_call_is_left_behind():
    layer = nn.Linear(3, 2)
    assert layer._compiled_call_impl is None
    layer.compile(backend="eager")
    assert layer._compiled_call_impl is not None
    assert seams._COMPILED_CALL not in seams.attributes_of(layer)
    assert copy.deepcopy(layer)._compiled_call_impl is None


def test_attributes_of_torch_are_told_from_the_authors():
    assert set(vars(Owner())) - seams.MODULE_ATTRIBUTES == {"note"}


@pytest.mark.parametrize(("kdim", "jointly"), [(None, True), (8, False)])
def test_attention_with_one_projection_or_three(kdim, jointly):
    attention = nn.MultiheadAttention(16, 2, kdim=kdim)
    assert seams.projects_jointly(attention) is jointly
    assert (attention.in_proj_weight is not None) is jointly
    assert type(attention.out_proj) is seams.NonDynamicallyQuantizableLinear


def test_attention_is_computed_by_the_function_that_is_called_here():
    torch.manual_seed(0)
    layer, x = nn.MultiheadAttention(8, 2), torch.randn(3, 1, 8)
    output, weights = seams.multi_head_attention_forward(
        x, x, x, 8, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
        layer.out_proj.weight, layer.out_proj.bias,
    )  # fmt: skip
    torch.testing.assert_close((output, weights), layer(x, x, x))
    known = inspect.signature(nn.functional.multi_head_attention_forward).parameters
    given = "use_separate_proj_weight q_proj_weight k_proj_weight v_proj_weight need_weights"
    assert {*given.split(), "attn_mask", "average_attn_weights", "is_causal"} <= set(known)


# What subclasses replace


KINDS = {
    nn.Module: FactorisedLinear,
    nn.RNNBase: FactorisedLSTM,
    nn.MultiheadAttention: FactorisedMultiheadAttention,
}
REPLACED = [(owner, name) for owner, names in seams.OVERRIDDEN_NAMES.items() for name in names]
BY_INSTANCE = ("__getattr__", "_flat_weights_names", "_flat_weight_refs")


@pytest.mark.parametrize(("owner", "name"), REPLACED)
def test_what_layers_replace_is_torch_s(owner, name):
    dense = nn.LSTM(4, 4) if owner is nn.RNNBase else owner
    assert hasattr(dense, name)
    ours = [c for c in KINDS[owner].__mro__ if c.__module__.startswith("fedpara_plugins")]
    if name not in BY_INSTANCE:
        assert any(name in vars(c) for c in ours)


def test_moves_and_casts_write_through_apply(monkeypatch):
    called = []
    apply = nn.Module._apply
    monkeypatch.setattr(nn.Module, "_apply", lambda m, *args: called.append(m) or apply(m, *args))
    layer = nn.Linear(2, 2)
    for move in (layer.double, layer.cpu, lambda: layer.to("cpu"), layer.bfloat16, layer.float):
        move()
    assert called == [layer] * 5


def test_copies_and_unpickled_modules_are_set_up_by_setstate(monkeypatch):
    called = []
    setstate = nn.Module.__setstate__
    monkeypatch.setattr(nn.Module, "__setstate__", lambda m, s: called.append(m) or setstate(m, s))
    copied = copy.deepcopy(nn.Linear(2, 2))
    unpickled = pickle.loads(pickle.dumps(nn.Linear(2, 2)))
    assert called == [copied, unpickled]


def test_recurrent_layers_compute_from_their_list():
    layer, x = nn.LSTM(4, 4), torch.randn(3, 1, 4)
    own = [getattr(layer, name) for name in layer._flat_weights_names]
    assert [id(w) for w in layer._flat_weights] == [id(w) for w in own]
    assert [id(ref()) for ref in layer._flat_weight_refs] == [id(w) for w in own]
    assert layer(x)[0].any()
    layer._flat_weights = [torch.zeros_like(w) for w in own]
    assert not layer(x)[0].any()
    layer._init_flat_weights()
    assert layer(x)[0].any()
    seams.own_parameters(layer)["weight_ih_l0"] = nn.Parameter(torch.ones(16, 4))
    layer._update_flat_weights()
    assert layer._flat_weights[0] is layer.weight_ih_l0


def test_recurrent_layers_check_their_input_by_the_method_that_is_replaced(monkeypatch):
    called = []
    monkeypatch.setattr(nn.LSTM, "check_input", lambda *_: called.append(1), raising=False)
    nn.LSTM(4, 4)(torch.randn(3, 1, 4))
    assert called == [1]


def test_attention_starts_by_the_method_that_is_replaced(monkeypatch):
    called = []
    monkeypatch.setattr(nn.MultiheadAttention, "_reset_parameters", lambda m: called.append(m))
    layer = nn.MultiheadAttention(8, 2)
    assert called == [layer]


# Optimizers


def test_steps_of_every_optimizer_are_seen():
    seen = []
    handles = [
        seams.register_optimizer_step_pre_hook(lambda *_: seen.append("before")),
        seams.register_optimizer_step_post_hook(lambda *_: seen.append("after")),
    ]
    try:
        parameter = nn.Parameter(torch.ones(2))
        parameter.grad = torch.ones(2)
        torch.optim.SGD([parameter], lr=0.1).step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["before", "after"]


# Weights that are no ordinary parameters


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (nn.utils.weight_norm, "WeightNorm"),
        (nn.utils.spectral_norm, "SpectralNorm"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "L1Unstructured"),
    ],
)
def test_hooks_that_compute_a_weight_are_seen(change, kind):
    layer = nn.Linear(8, 8)
    layer.register_forward_pre_hook(lambda *_: None)
    assert not list(seams.weight_hooks(layer))
    change(layer)
    ((module, found),) = seams.weight_hooks(layer)
    assert module.startswith("torch.nn.utils.")
    assert found == kind


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_layers_are_seen():
    from torch.ao.nn import qat, quantized
    from torch.ao.quantization import get_default_qat_qconfig

    for layer in (
        quantized.Linear(8, 8),
        quantized.dynamic.Linear(8, 8),
        quantized.dynamic.LSTM(8, 8),
    ):
        assert seams.is_quantised(layer)
        assert not seams.trains_for_quantisation(layer)
    trains = qat.Linear(8, 8, qconfig=get_default_qat_qconfig("x86"))
    assert seams.trains_for_quantisation(trains)
    for layer in (nn.Linear(8, 8), nn.LSTM(8, 8), nn.ReLU()):
        assert not seams.is_quantised(layer)
        assert not seams.trains_for_quantisation(layer)


# The one place


def private_names_of_torch():
    kinds = (nn.Module(), nn.LSTM(2, 2), nn.MultiheadAttention(2, 1), torch.ones(1))
    names = {name for thing in kinds for name in dir(thing)}
    return {name for name in names if re.match(r"_[^_]", name)} | {"_C", "_current_level"}


def test_nothing_private_of_torch_is_used_elsewhere():
    """Except by layers, as listed: they read it in every step, or replace it by name."""
    private = private_names_of_torch()
    listed = {name for names in seams.HOT_ATTRIBUTES.values() for name in names}
    listed |= {name for names in seams.OVERRIDDEN_NAMES.values() for name in names}
    found = []
    for path in (path for room in ROOMS for path in (CORE / room).rglob("*.py")):
        if path.name == "torch_seams.py":
            continue
        allowed = listed if path.parent.name == "layers" else set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in private - allowed:
                found.append(f"{path.relative_to(CORE)}:{node.lineno}: {node.attr}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch._"):
                found.append(f"{path.relative_to(CORE)}:{node.lineno}: {node.module}")
    assert not found


def test_every_entry_says_where_it_was_seen():
    tree = ast.parse((CORE / "support" / "torch_seams.py").read_text())
    texts = {n.name: ast.get_docstring(n) for n in tree.body if isinstance(n, ast.FunctionDef)}
    for node, after in pairwise(tree.body):
        if isinstance(node, ast.Assign) and isinstance(after, ast.Expr):
            texts[node.targets[0].id] = after.value.value
    exported = {
        "NonDynamicallyQuantizableLinear",
        "TensorWeakRef",
        "register_optimizer_step_post_hook",
        "register_optimizer_step_pre_hook",
    }
    assert set(seams.__all__) == {name for name in texts if name[0] != "_"} | exported
    assert [name for name, text in texts.items() if "orch 2.4.0 to 2.14.1" not in text] == []


# Optimizer steps


def seen_in_steps(look, optimizer):
    """Return what a function finds inside the steps of an optimizer, and that optimizer."""
    seen = []
    handle = seams.register_optimizer_step_pre_hook(
        lambda one, args, kwargs: seen.append(look(one)) if one is optimizer else None
    )
    return seen, handle


def one_parameter():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return parameter


def test_steps_on_the_stack_are_counted():
    class Child(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    torch.optim.SGD([one_parameter()], lr=0.1)  # its class has hooks from now on
    for kind, expected in ((torch.optim.SGD, [1]), (Child, [1, 2])):
        optimizer = kind([one_parameter()], lr=0.1)
        seen, handle = seen_in_steps(seams.steps_on_stack, optimizer)
        optimizer.step()
        handle.remove()
        assert seen == expected
        assert seams.steps_on_stack(optimizer) == 0


def test_functions_above_a_step():
    class Around:
        def second_step(self, optimizer):
            optimizer.step()

    optimizer = torch.optim.SGD([one_parameter()], lr=0.1)
    seen, handle = seen_in_steps(seams.functions_above, optimizer)
    Around().second_step(optimizer)
    handle.remove()
    function, around = seen[0][0]
    assert (function, type(around)) == ("second_step", Around)


def noting():
    """Return a list, and what makes a hook of a step that appends its name to it."""
    called = []
    return called, lambda name: lambda optimizer, args, kwargs: called.append(name)


def test_an_optimizer_s_own_hooks_are_known_and_run_after_those_of_all():
    called, note = noting()
    optimizer = torch.optim.SGD([one_parameter()], lr=0.1)
    assert not seams.own_step_hooks(optimizer)
    handle = seams.register_optimizer_step_pre_hook(note("all"))
    own = [note("first"), note("second")]
    for hook in own:
        optimizer.register_step_pre_hook(hook)
    assert list(seams.own_step_hooks(optimizer).values()) == own
    optimizer.step()
    handle.remove()
    assert called == ["all", "first", "second"]


def test_a_hook_may_come_first_after_a_step():
    called, note = noting()
    optimizer = torch.optim.SGD([one_parameter()], lr=0.1)
    assert not seams.own_step_end_hooks(optimizer)
    handle = seams.register_optimizer_step_post_hook(note("all"))
    optimizer.register_step_post_hook(note("own"))
    first = note("first")
    own = seams.hook_step_end_first(optimizer, first)
    assert next(iter(seams.own_step_end_hooks(optimizer).values())) is first
    optimizer.step()
    handle.remove()
    own.remove()
    optimizer.step()
    assert called == ["first", "own", "all", "own"]


@pytest.mark.parametrize("fused", [False, True])
def test_the_scaler_that_steps_is_found(fused):
    parameter = one_parameter()
    optimizer = torch.optim.SGD([parameter], lr=0.1, fused=fused)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # wraps the optimizer's step
    scaler = torch.amp.GradScaler("cpu")
    off = torch.amp.GradScaler("cpu", enabled=False)
    seen, handle = seen_in_steps(seams.stepping_scaler, optimizer)
    before = seams.scaler_round(scaler)
    scaler.scale(parameter.sum()).backward()
    scaler.step(optimizer)
    assert seams.scaler_round(scaler) is before
    scaler.update()
    assert seams.scaler_round(scaler) is not before
    off.step(optimizer)
    optimizer.step()
    handle.remove()
    assert seen == [scaler, None, None]


def test_what_a_scaler_leaves_at_a_fused_optimizer():
    """`real_steps` reads and clears it."""
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(parameter.sum()).backward()
    seen, handle = seen_in_steps(
        lambda one: (
            float(one.grad_scale),
            float(one.found_inf),
            one.param_groups[0]["params"][0].grad[0].item(),
        ),
        optimizer,
    )
    scaler.step(optimizer)
    handle.remove()
    assert seen == [(1024.0, 0.0, 1024.0)]
    assert not hasattr(optimizer, "grad_scale")
    assert parameter.tolist() == [0.0, 0.0]


def test_lbfgs_starts_anew():
    """The next step is then along the gradient, as the first one of a new optimizer."""
    ways = []
    for forget in (False, True):
        parameter = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        optimizer = torch.optim.LBFGS([parameter], lr=0.1, max_iter=3)

        def closure(parameter=parameter, optimizer=optimizer):
            optimizer.zero_grad()
            value = (parameter.square() * torch.tensor([1.0, 10.0])).sum()
            value.backward()
            return value

        optimizer.step(closure)
        if forget:
            seams.forget_curvature(optimizer)
        optimizer.param_groups[0]["max_iter"] = 1
        before = parameter.detach().clone()
        closure()
        gradient = parameter.grad.clone()
        optimizer.step(closure)
        way = parameter.detach() - before
        ways.append(float(-way @ gradient / way.norm() / gradient.norm()))
    assert ways[0] < 0.999
    assert ways[1] == pytest.approx(1.0)


def test_backward_passes_are_seen():
    seen = []
    parameter = nn.Parameter(torch.ones(2))
    parameter.register_hook(lambda gradient: seen.append(seams.in_backward()))
    parameter.sum().backward()
    assert seen == [True]
    assert not seams.in_backward()


def test_backward_passes_have_numbers_and_ends():
    seen = []
    parameter = nn.Parameter(torch.ones(2))

    def note(gradient):
        seams.at_end_of_backward(lambda: seen.append(parameter.grad is not None))
        seen.append(seams.backward_number())

    parameter.register_hook(note)
    for _ in range(2):
        parameter.grad = None
        parameter.sum().backward()
    first, ended, second, ended_too = seen
    assert (ended, ended_too) == (True, True)
    assert first != second
    assert seams.backward_number() is None


@pytest.mark.parametrize("nested", [False, True])
def test_a_backward_pass_inside_of_another_is_seen(nested):
    seen = []
    inputs = torch.ones(2, requires_grad=True)
    layer = nn.Linear(2, 2)
    layer.weight.register_hook(lambda gradient: seen.append(seams.in_nested_backward()))
    checkpoint(layer, inputs, use_reentrant=nested).sum().backward()
    assert seen == [nested]
    assert not seams.in_nested_backward()


def test_weak_references_to_gradients_and_their_versions():
    parameter = nn.Parameter(torch.ones(2))
    parameter.sum().backward()
    before = seams.version_of(parameter.grad)
    parameter.sum().backward()
    assert seams.version_of(parameter.grad) > before
    reference = seams.TensorWeakRef(parameter.grad)
    assert reference() is parameter.grad
    parameter.grad.add_(1)
    assert reference() is parameter.grad
    parameter.grad = None
    assert reference() is None


def test_a_broken_graph_runs_what_follows_eagerly():
    seen = []

    def outside(x):
        seen.append((torch.compiler.is_compiling(), type(x)))
        return x + 1

    def compiled(**options):
        def function(x):
            x = x * 2
            if torch.compiler.is_compiling():
                seams.break_graph("fedpara: a reason")
                return seams.run_eagerly(outside, x) * 3
            return x

        torch.compiler.reset()
        return torch.compile(function, backend="eager", **options)

    torch.testing.assert_close(compiled()(torch.ones(2)), torch.full((2,), 9.0))
    assert seen == [(False, torch.Tensor)]
    with pytest.raises(Exception, match="fedpara: a reason" if seams._TAKES_REASON else "break"):
        compiled(fullgraph=True)(torch.ones(2))


# torch.fx, tensors that are subclasses, and hooks on loading


def test_symbolic_tracing_is_seen():
    seen = []

    class Model(nn.Module):
        def forward(self, x):
            seen.append(seams.is_symbolically_tracing())
            return x + 1

    torch.fx.symbolic_trace(Model())
    assert seen == [True]
    assert not seams.is_symbolically_tracing()


def test_a_module_with_the_attribute_is_a_leaf_of_a_trace():
    class Inner(nn.Module):
        def forward(self, x):
            return x + 1

    model = nn.Sequential(Inner())
    operations = [node.op for node in torch.fx.symbolic_trace(model).graph.nodes]
    assert "call_module" not in operations
    vars(model[0]).update(seams.FX_LEAF)
    traced = torch.fx.symbolic_trace(model)
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "output"]
    assert type(model[0]).__module__ == __name__


def test_results_of_a_subclass_without_torch_function_are_plain():
    class Kind(torch.Tensor):
        __torch_function__ = seams.disabled_torch_function

    value = torch.ones(3, requires_grad=True).mul(2).as_subclass(Kind)
    assert type(value) is Kind
    assert type(value + 1) is type(value.detach()) is torch.Tensor
    assert not torch.overrides.has_torch_function((value,))
    assert type(nn.Parameter(torch.ones(1)) + 1) is torch.Tensor


def test_a_hook_may_change_what_a_module_loads():
    inner = nn.Linear(2, 2)
    called = []

    def hook(module, state, prefix, *rest):
        called.append((module, prefix))
        state[prefix + "bias"] = torch.full((2,), 7.0)

    seams.register_load_state_dict_pre_hook(inner, hook)
    model = nn.Sequential(inner)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert called == [(inner, "0.")]
    assert inner.bias.tolist() == [7.0, 7.0]
    assert state["0.bias"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
        nn.Conv3d(4, 6, 3, padding="same", dilation=2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_convolution_takes_another_weight(layer):
    inputs = torch.randn(2, 4, *[7] * (layer.weight.dim() - 2))
    found = seams.convolve(layer, inputs, layer.weight[:2], None)
    expected = layer(inputs)[:, :2] - layer.bias[:2].view(2, *[1] * (layer.weight.dim() - 2))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
