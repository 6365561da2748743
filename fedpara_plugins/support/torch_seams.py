"""Everything this project uses of torch that torch does not document as public.

A new version of torch may change any of it without notice. Each entry says which versions it was
seen in and why no public way exists; ``tests/support/test_torch_seams.py`` fails when an entry is
gone or means something else. This module imports nothing of the project.

Plain names are torch's own functions, so a call costs nothing more. `HOT_ATTRIBUTES` and
`OVERRIDDEN_NAMES` list what cannot pass through here: attributes that are read for every layer in
every step, and methods that subclasses replace by name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction
from torch.fx import _symbolic_trace
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

__all__ = [
    "FX_LEAF",
    "HOT_ATTRIBUTES",
    "MODULE_ATTRIBUTES",
    "OVERRIDDEN_NAMES",
    "NonDynamicallyQuantizableLinear",
    "TensorWeakRef",
    "are_functorch_transforms_active",
    "assembled_module",
    "at_end_of_backward",
    "attributes_of",
    "backward_number",
    "break_graph",
    "convolve",
    "count_dispatch_modes",
    "disabled_torch_function",
    "forget_curvature",
    "functions_above",
    "has_hooks",
    "hook_step_end_first",
    "in_backward",
    "in_forward_mode",
    "in_nested_backward",
    "is_legacy_batchedtensor",
    "is_quantised",
    "is_symbolically_tracing",
    "is_tracing",
    "multi_head_attention_forward",
    "own_buffers",
    "own_children",
    "own_parameters",
    "own_step_end_hooks",
    "own_step_hooks",
    "persistent_buffers",
    "projects_jointly",
    "register_load_state_dict_pre_hook",
    "register_optimizer_step_post_hook",
    "register_optimizer_step_pre_hook",
    "run_eagerly",
    "saved_tensors_hooks_are_enabled",
    "scaler_round",
    "stepping_scaler",
    "steps_on_stack",
    "tanh_backward",
    "trains_for_quantisation",
    "version_of",
    "weight_hooks",
]

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

# Names that torch exports and does not document, torch 2.4.0 to 2.14.1.
#
# `NonDynamicallyQuantizableLinear`: the class of `nn.MultiheadAttention.out_proj`. Conversion
# matches classes exactly, so it needs the name.
#
# `register_optimizer_step_pre_hook` and its twin: hooks around the steps of every optimizer of the
# process. The documented hooks belong to one optimizer, which users build out of our sight.
#
# `TensorWeakRef`: a weak reference to a tensor. Python's own may return an object that torch has
# given up, which this one mends.

# Functions of torch's C++ part

is_tracing = torch._C._is_tracing
"""Return whether `torch.jit.trace` runs. Seen in torch 2.4.0 to 2.14.1.

The public `torch.jit.is_tracing` asks the same through two more functions of Python; this one is
asked before each use of a weight.
"""

are_functorch_transforms_active = torch._C._are_functorch_transforms_active
"""Return whether a transform of `torch.func` runs. Seen in torch 2.4.0 to 2.14.1.

No public function says so. `torch.autograd.Function.apply` asks this one.
"""

count_dispatch_modes = torch._C._len_torch_dispatch_stack
"""Return how many modes of dispatch are active. Seen in torch 2.4.0 to 2.14.1.

Fake tensors, counters of operations and selective checkpoints are such modes. No public function
counts them.
"""

is_legacy_batchedtensor = torch._C._functorch.is_legacy_batchedtensor
"""Return whether a tensor stands for many. Seen in torch 2.4.0 to 2.14.1.

Gradients do under ``torch.autograd.grad(..., is_grads_batched=True)``, which is no transform of
`torch.func`. They look like ordinary tensors otherwise.
"""

saved_tensors_hooks_are_enabled = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]
"""Return whether hooks on saved tensors may be in force. Seen in torch 2.4.0 to 2.14.1.

Publicly such hooks can be set and forbidden, and not asked about.
"""

disabled_torch_function = torch._C._disabled_torch_function_impl
"""The ``__torch_function__`` of a tensor's subclass whose results are plain tensors.

Seen in torch 2.4.0 to 2.14.1. `nn.Parameter` has it. A public one would run for every operation,
and torch's own checks would take the tensor for a foreign one.
"""

tanh_backward = torch.ops.aten.tanh_backward
"""Return the gradient before tanh, from that behind it and tanh's result.

Seen in torch 2.4.0 to 2.14.1. One pass through memory, where ``gradient * (1 - result**2)`` from
public functions takes three.
"""

# Attributes and methods of torch's classes

HOT_ATTRIBUTES = {nn.Module: ("_parameters",), Tensor: ("_version",)}
"""Private attributes that layers read at each use of a weight, without a function between.

Seen in torch 2.4.0 to 2.14.1. ``Module._parameters`` is the dictionary behind `own_parameters`.
``Tensor._version`` counts changes in place; autograd checks saved tensors by it, and no public
function returns it.
"""

OVERRIDDEN_NAMES = {
    nn.Module: ("_apply", "__setstate__", "__setattr__", "__getattr__"),
    nn.RNNBase: (
        "_flat_weights",
        "_flat_weights_names",
        "_flat_weight_refs",
        "_init_flat_weights",
        "_update_flat_weights",
        "check_input",
    ),
    nn.MultiheadAttention: ("_reset_parameters",),
}
"""Methods and attributes that factorised layers replace, or maintain for torch, by name.

Seen in torch 2.4.0 to 2.14.1. ``_apply`` is how ``to``, ``double`` and ``cuda`` write parameters,
and tells nobody else. ``RNNBase`` hands ``_flat_weights`` to its kernels, a list that it fills by
``_flat_weights_names`` in ``__init__`` and ``_init_flat_weights``; it has no other place for a
weight that is no parameter.
``MultiheadAttention`` calls its ``reset_parameters`` by another name.
"""

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What torch itself keeps in every module. Seen in torch 2.4.0 to 2.14.1.

All else in a module's ``__dict__`` is its author's. torch has no list of its own.
"""

FX_LEAF = {"__module__": "torch.nn.modules"}
"""The attribute of a module that `torch.fx` keeps whole in its graphs.

Seen in torch 2.4.0 to 2.14.1. ``Tracer.is_leaf_module`` asks the instance for ``__module__``, and
keeps modules of ``torch.nn``. Publicly only the author of a tracer can say which modules to keep.
Classes are found by the ``__module__`` of the class, which stays.
"""

_COMPILED_CALL = "_compiled_call_impl"
"""Where ``Module.compile`` puts the compiled call. Seen in torch 2.4.0 to 2.14.1.

There is no public way to clear it.
"""


# Autograd


is_symbolically_tracing = getattr(
    _symbolic_trace,
    "_get_is_fx_tracing",
    lambda: _symbolic_trace._is_fx_tracing_flag,
)
"""Return whether `torch.fx` traces, so that values may be proxies. Seen in torch 2.4.0 to 2.14.1.

The flag is one of the process up to 2.13, and one of each thread since. The function of that name
in ``torch.fx`` is no more public than the flag, and warns in some versions.
"""


def in_forward_mode() -> bool:
    """Return whether `torch.autograd.forward_ad.dual_level` is open.

    Seen in torch 2.4.0 to 2.14.1. The level is a private global of the module; nothing public
    returns it.
    """
    return forward_ad._current_level >= 0


def has_hooks(tensor: Tensor) -> bool:
    """Return whether ``register_hook`` or ``register_post_accumulate_grad_hook`` was called on it.

    Seen in torch 2.4.0 to 2.14.1. The public methods add and remove hooks, and do not tell of them.
    """
    accumulated = getattr(tensor, "_post_accumulate_grad_hooks", None)
    return bool(tensor._backward_hooks or accumulated)


# Modules


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return a module's own parameters by attribute, the very dictionary that torch keeps.

    Seen in torch 2.4.0 to 2.14.1. ``named_parameters(recurse=False)`` is public; it leaves out
    parameters that are None, a user's class may override it, and nothing can be put back through
    it.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return a module's own buffers by attribute, the very dictionary that torch keeps.

    Seen in torch 2.4.0 to 2.14.1. See `own_parameters` for why ``named_buffers`` does not do.
    """
    return module._buffers


def own_children(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a module's children by attribute, one that has two names under both.

    Seen in torch 2.4.0 to 2.14.1. ``named_children`` gives such a child once.
    """
    return module._modules


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the own buffers that ``state_dict`` holds.

    Seen in torch 2.4.0 to 2.14.1. Nothing public tells persistent buffers from others but a whole
    ``state_dict``, which hooks may change.
    """
    skipped = module._non_persistent_buffers_set
    return {k: b for k, b in module._buffers.items() if b is not None and k not in skipped}


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """Return all attributes of a module but its compiled call, which would run the old module.

    Seen in torch 2.4.0 to 2.14.1. Parameters, buffers, children and hooks are entries of
    ``__dict__``; torch's ``__getstate__`` leaves the compiled call out as well.
    """
    attributes = module.__dict__.copy()
    attributes.pop(_COMPILED_CALL, None)
    return attributes


def assembled_module(
    kind: type[M], attributes: Mapping[str, Any], parameters: Mapping[str, nn.Parameter | None]
) -> M:
    """Return a module of a class with these attributes and parameters, without its ``__init__``.

    Seen in torch 2.4.0 to 2.14.1. A module is what its ``__dict__`` holds. ``__init__`` would draw
    weights only to drop them, and ``copy`` cannot change the class.

    Args:
        kind: the class.
        attributes: as `attributes_of` returns them.
        parameters: by attribute, in the order they shall have.
    """
    module = kind.__new__(kind)
    module.__dict__ = {**attributes, "_parameters": dict(parameters)}
    return module


def multi_head_attention_forward(*args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """Compute what `nn.MultiheadAttention` computes, from given weights.

    Seen in torch 2.4.0 to 2.14.1, exported and not documented. The documented
    ``scaled_dot_product_attention`` is a part of it, without projections and attention weights.
    The name is looked up at each call, as `nn.MultiheadAttention` does it.
    """
    return functional.multi_head_attention_forward(*args, **options)


def convolve(layer: nn.Module, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve inputs by a layer's stride, padding and dilation with another weight.

    Seen in torch 2.4.0 to 2.14.1. ``nn.Conv1d`` to ``nn.Conv3d`` do this in ``_conv_forward``,
    which pads by the layer's mode first; no public method takes a weight.

    Args:
        layer: an instance of one of these classes.
        inputs: as for its forward.
        weight: shape (out, in / groups, k1, ...).
        bias: shape (out,), or None.
    """
    return layer._conv_forward(inputs, weight, bias)  # type: ignore[no-any-return, operator]


def projects_jointly(attention: nn.MultiheadAttention) -> bool:
    """Return whether queries, keys and values have one projection matrix between them.

    Seen in torch 2.4.0 to 2.14.1. The public sizes say so as well, and torch's forward asks this
    flag.
    """
    jointly: bool = attention._qkv_same_embed_dim
    return jointly


def register_load_state_dict_pre_hook(module: nn.Module, hook: Callable[..., None]) -> None:
    """Call a hook with the module, the state and the prefix before a module loads its own part.

    Seen in torch 2.4.0 to 2.14.1. The public method of this name came with torch 2.6.
    """
    module._register_load_state_dict_pre_hook(hook, with_module=True)  # type: ignore[no-untyped-call]


# Weights that are no ordinary parameters


def weight_hooks(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield module and class of each hook of `torch.nn.utils` that computes a weight.

    Seen in torch 2.4.0 to 2.14.1. ``weight_norm``, ``spectral_norm`` and ``prune`` register an
    object of such a class to run before the forward; only ``prune`` has a public question for it.
    """
    for hook in layer._forward_pre_hooks.values():
        kind = type(hook)
        if kind.__module__.startswith("torch.nn.utils."):
            yield kind.__module__, kind.__name__


def is_quantised(layer: nn.Module) -> bool:
    """Return whether a layer is one of torch's quantised ones, whose weight is no parameter.

    Seen in torch 2.4.0 to 2.14.1. These classes share no base class and no flag; they share the
    word ``quantized`` in their modules' names.
    """
    kind = type(layer)
    owns_weight = hasattr(kind, "weight") or hasattr(layer, "weight") or "RNN" in str(kind.__mro__)
    return ".quantized." in f"{kind.__module__}." and owns_weight


def trains_for_quantisation(layer: nn.Module) -> bool:
    """Return whether a layer is one of torch's for quantisation-aware training.

    Seen in torch 2.4.0 to 2.14.1. See `is_quantised`; here the modules' names hold ``qat``.
    """
    return ".qat." in f"{type(layer).__module__}."


# Optimizer steps

_STEP = Optimizer.profile_hook_step(lambda optimizer: None).__code__
"""The function that torch puts around each optimizer's ``step``, which calls the hooks.

Seen in torch 2.4.0 to 2.14.1. It calls the optimizer ``self``. If a step ends by an error, no hook
is called, so nothing but the stack says whether a step still runs.
"""

_ABOVE = 16
"""How many functions may stand between `GradScaler.step` and the optimizer's.

Seen in torch 2.4.0 to 2.14.1: two. Schedulers of learning rates and tools such as accelerate put
some there.
"""


def steps_on_stack(optimizer: Optimizer) -> int:
    """Return how many calls of an optimizer's ``step`` run in this thread, one inside another.

    Seen in torch 2.4.0 to 2.14.1. A subclass that calls ``super().step()`` has two, and torch
    calls the hooks for both.
    """
    return sum(
        frame.f_code is _STEP and frame.f_locals.get("self") is optimizer for frame in _frames()
    )


def functions_above(optimizer: Optimizer) -> list[tuple[str, object]]:
    """Return the functions above an optimizer's ``step``, each with its object, or None.

    Seen in torch 2.4.0 to 2.14.1. See `steps_on_stack`.
    """
    found, above = [], False
    for frame in _frames():
        if above:
            found.append((frame.f_code.co_name, frame.f_locals.get("self")))
        above = above or (frame.f_code is _STEP and frame.f_locals.get("self") is optimizer)
    return found[:_ABOVE]


def own_step_hooks(optimizer: Optimizer) -> Mapping[int, Callable[..., Any]]:
    """Return the hooks of ``optimizer.register_step_pre_hook``, in their order.

    Seen in torch 2.4.0 to 2.14.1. They run after those of every optimizer. The public method adds
    hooks, and does not tell of them.
    """
    return optimizer._optimizer_step_pre_hooks


def own_step_end_hooks(optimizer: Optimizer) -> Mapping[int, Callable[..., Any]]:
    """Return the hooks of ``optimizer.register_step_post_hook``, in their order.

    Seen in torch 2.4.0 to 2.14.1. They run before those of every optimizer. See `own_step_hooks`.
    """
    return optimizer._optimizer_step_post_hooks


def hook_step_end_first(optimizer: Optimizer, hook: Callable[..., None]) -> RemovableHandle:
    """Register a hook that runs after an optimizer's step, before those that are there.

    Seen in torch 2.4.0 to 2.14.1. The public method appends to an ordered dictionary.
    """
    handle = optimizer.register_step_post_hook(hook)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    return handle


def stepping_scaler(optimizer: Optimizer) -> GradScaler | None:
    """Return the `GradScaler` whose ``step`` is stepping this optimizer; None without one.

    Seen in torch 2.4.0 to 2.14.1. A scaler leaves no trace at an ordinary optimizer: it unscales
    the gradients, and calls ``step``.
    """
    for depth, frame in enumerate(_frames()):
        if frame.f_code is GradScaler.step.__code__:
            scaler = frame.f_locals.get("self")
            if frame.f_locals.get("optimizer") is optimizer and isinstance(scaler, GradScaler):
                return scaler if scaler.is_enabled() else None
        if depth > 2 * _ABOVE:
            break
    return None


def scaler_round(scaler: GradScaler) -> object:
    """Return an object that is another one after each ``scaler.update()``.

    Seen in torch 2.4.0 to 2.14.1. A scaler replaces what it knows of its optimizers in each update.
    """
    return scaler._per_optimizer_states


def _frames() -> Iterator[FrameType]:
    """Yield the functions that run in this thread, innermost first.

    Python's, as it was with torch 2.4.0 to 2.14.1; the seams above look for torch's among them.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def forget_curvature(optimizer: torch.optim.LBFGS) -> None:
    """Let LBFGS start anew at its next step.

    Seen in torch 2.4.0 to 2.14.1. LBFGS keeps earlier directions in its state and drops them where
    the state's ``n_iter`` is 0.
    """
    for state in optimizer.state.values():
        if "n_iter" in state:
            state["n_iter"] = 0


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was changed in place. Seen in torch 2.4.0 to 2.14.1.

    See `HOT_ATTRIBUTES`. A backward pass that adds to a gradient changes it in place.
    """
    return tensor._version


def in_backward() -> bool:
    """Return whether this thread is amid a backward pass. Seen in torch 2.4.0 to 2.14.1.

    Hooks of tensors run there. No public function says so.
    """
    return torch._C._current_graph_task_id() != -1


def backward_number() -> int | None:
    """Return the number of the backward pass that this thread is amid; None outside of any.

    Seen in torch 2.4.0 to 2.14.1. Each pass of the process has its own number, and so has a pass
    inside of another. See `in_backward`.
    """
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


def in_nested_backward() -> bool:
    """Return whether the backward pass of this thread was called by another one.

    Seen in torch 2.4.0 to 2.14.1. ``torch.utils.checkpoint`` with ``use_reentrant=True`` calls it
    in the backward of a function. The inner pass has a number and an end of its own, and nothing
    but the stack says that there is an outer one.
    """
    called = False
    for frame in _frames():
        if called and any(isinstance(one, BackwardCFunction) for one in frame.f_locals.values()):
            return True
        called = called or frame.f_code is torch.autograd.backward.__code__
    return False


def at_end_of_backward(function: Callable[[], None]) -> None:
    """Call a function when the present backward pass has ended without an error.

    Seen in torch 2.4.0 to 2.14.1. torch's own data parallel modules do this; hooks of a tensor, the
    public ones, run before the gradients of others are there.
    """
    torch.autograd.Variable._execution_engine.queue_callback(function)


def run_eagerly(function: Callable[..., T], *args: Any) -> T:
    """Call a function without tracing it, from code that `torch.compile` traces.

    Seen in torch 2.4.0 to 2.14.1. Public, and without annotations. Call `break_graph` first: what
    `torch.compiler.disable` returns cannot be part of a graph.
    """
    result: T = torch.compiler.disable(function)(*args)  # type: ignore[no-untyped-call]
    return result


def break_graph(reason: str) -> None:
    """Leave the graph that `torch.compile` is tracing, or end the compilation of a full graph.

    Seen in torch 2.4.0 to 2.14.1. The public `torch.compiler` only marks whole functions, and its
    import takes seconds. The reason is in the error of a full graph where torch takes one.
    """
    from torch._dynamo.decorators import graph_break

    if _TAKES_REASON:
        graph_break(msg=reason)
    else:
        graph_break()


_TAKES_REASON = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 8)
