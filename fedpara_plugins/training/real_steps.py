"""The moment in an optimizer's step at which its gradients are what it is about to use.

A plain ``optimizer.step()`` uses the gradients that it finds. With a closure it computes them
itself, once or many times, after all hooks of torch have run. A fused optimizer under a
`torch.amp.GradScaler` finds gradients that are still scaled, and steps that it will skip. An
optimizer that wraps another one steps by the other's step. `observe_real_steps` calls its observers
at the right moment in all these cases, in any number of threads.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from fedpara_plugins.layers.base import layers_alive
from fedpara_plugins.support.torch_seams import (
    break_graph,
    functions_above,
    hook_step_end_first,
    own_step_end_hooks,
    own_step_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
    run_eagerly,
    stepping_scaler,
    steps_on_stack,
)

__all__ = ["Step", "StepObserver", "add_observer", "observe_real_steps", "parameters_of"]

log = logging.getLogger(__name__)

WHY = (
    "fedpara: the options clip, decay and schedule act before each optimizer step, outside of "
    "compiled code: compile the step without fullgraph=True, or compile the model alone"
)


AVERAGING = frozenset({"ScheduleFreeWrapper", "ScheduleFreeWrapperReference", "Lookahead"})
"""Classes that step another optimizer and move the parameters further, by name.

Other classes around an optimizer, such as accelerate's, move nothing.
"""


class Step:
    """One step of one optimizer.

    Attributes:
        optimizer: the optimizer.
        scaler: the `torch.amp.GradScaler` that makes the step, or None.
        evaluations: how often its gradients were ready: once, or with a closure once a call.
        completed: at its end, whether it went through without an error.
        continued: ids of the models whose present step another optimizer has begun.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.scaler = stepping_scaler(optimizer)
        self.evaluations = 0
        self.completed = False
        self.continued: set[int] = set()

    def unscale(self) -> None:
        """Divide the gradients by the scaler's factor if the optimizer would do so itself."""
        scale = getattr(self.optimizer, "grad_scale", None)
        if isinstance(scale, torch.Tensor):
            for parameter in parameters_of(self.optimizer):
                if parameter.grad is not None:
                    parameter.grad.div_(scale.to(parameter.grad.device))
            self.optimizer.grad_scale = None  # type: ignore[attr-defined]

    def callers(self) -> list[tuple[str, object]]:
        """Return the functions that make this step, innermost first, each with its object."""
        return functions_above(self.optimizer)

    def averaging(self) -> list[Any]:
        """Return the objects around the optimizer that move the parameters after its step."""
        return [
            owner
            for _, owner in self.callers()
            if any(kind.__name__ in AVERAGING for kind in type(owner).__mro__)
        ]


def _of_interest(optimizer: Optimizer) -> bool:
    return True


def _nothing(step: Step) -> None:
    return None


class StepObserver(NamedTuple):
    """Callbacks around the steps of optimizers.

    Attributes:
        ready: called when gradients are ready: right before the step, or after each closure.
        end: called after the step.
        begin: called before the step, and before its closure.
        concerns: whether an optimizer's steps are of interest; others are not touched at all.
    """

    ready: Callable[[Step], None]
    end: Callable[[Step], None]
    begin: Callable[[Step], None] = _nothing
    concerns: Callable[[Optimizer], bool] = _of_interest


_lock = threading.Lock()
_observers: tuple[StepObserver, ...] = ()
_running: weakref.WeakKeyDictionary[Optimizer, _Running] = weakref.WeakKeyDictionary()
_own_handles: weakref.WeakKeyDictionary[Optimizer, dict[str, RemovableHandle]]
_own_handles = weakref.WeakKeyDictionary()
Hooks = Mapping[int, Callable[..., Any]]
_ignored_closures: set[type[Optimizer]] = set()


def add_observer(observer: StepObserver) -> None:
    """Add an observer for good."""
    global _observers
    with _lock:
        _observers = (*_observers, observer)


@contextmanager
def observe_real_steps(observer: StepObserver) -> Iterator[None]:
    """Call an observer, after those that were there before, while the context lasts."""
    global _observers
    add_observer(observer)
    try:
        yield
    finally:
        with _lock:
            _observers = tuple(other for other in _observers if other is not observer)


def parameters_of(optimizer: Optimizer) -> list[torch.Tensor]:
    """Return all parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class _Running:
    """A step that has begun, and the observers it had then."""

    def __init__(self, step: Step, observers: tuple[StepObserver, ...]) -> None:
        self.step = step
        self.observers = observers

    def begin(self) -> None:
        for observer in self.observers:
            observer.begin(self.step)

    def ready(self) -> None:
        self.step.evaluations += 1
        with torch.no_grad():
            for observer in self.observers:
                observer.ready(self.step)

    def end(self, *, completed: bool) -> None:
        _running.pop(self.step.optimizer, None)
        self.step.completed = completed
        for observer in self.observers:
            observer.end(self.step)


class _Closure:
    """A user's closure, after which the gradients are ready."""

    def __init__(self, closure: Callable[..., Any], running: _Running) -> None:
        self._closure = closure
        self._running = running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            loss = self._closure(*args, **kwargs)
            self._running.ready()
        except BaseException:
            self._running.end(completed=False)
            raise
        return loss


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> Arguments | None:
    # What the observers do depends on more than tensors, so they are never traced.
    if not torch.compiler.is_compiling():
        before, after = own_step_hooks(optimizer), own_step_end_hooks(optimizer)
        if (before or after) and any(one.concerns(optimizer) for one in _observers):
            _hook_inside_of_own(optimizer, before, after)
            if before:
                return None
        return _begin(optimizer, args, kwargs)
    if not _anything_to_observe():
        return None
    # Before torch 2.8 a full graph's error shows no reason, but this line of the source.
    break_graph(WHY)  # fedpara: clip, decay and schedule need a step without fullgraph=True
    return run_eagerly(_begin, optimizer, args, kwargs)


def _hook_inside_of_own(optimizer: Optimizer, before: Hooks, after: Hooks) -> None:
    """Let a step begin after the optimizer's own hooks, and end before those of its end.

    They may change gradients, and look at parameter groups.
    """
    handles = _own_handles.setdefault(optimizer, {})
    if before and list(before.values())[-1] is not _begin:
        if "begin" in handles:
            handles["begin"].remove()
        handles["begin"] = optimizer.register_step_pre_hook(_begin)
    if after and next(iter(after.values())) is not _after_step:
        if "end" in handles:
            handles["end"].remove()
        handles["end"] = hook_step_end_first(optimizer, _after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    if not torch.compiler.is_compiling():
        _end(optimizer)
    elif _anything_to_observe():
        break_graph("fedpara: the end of an optimizer step is not part of compiled code")
        run_eagerly(_end, optimizer)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _anything_to_observe() -> bool:
    # Not traced: torch.compile of 2.4 knows no length of a WeakSet.
    return len(layers_alive) > 0 or len(_observers) > 1


def _begin(optimizer: Optimizer, args: Any, kwargs: Any) -> Arguments | None:
    running = _running.get(optimizer)
    if running is not None and steps_on_stack(optimizer) < 2:
        running.end(completed=False)  # an error has ended that step
        running = None
    if running is None:
        observers = tuple(one for one in _observers if one.concerns(optimizer))
        if not observers or _overflowed(optimizer) or _steps_by_another(optimizer):
            return None
        given, kwargs = kwargs, _unscaled(optimizer, kwargs)
        if kwargs is not given and not _are_finite(optimizer):
            return args, kwargs  # the optimizer will skip this step
        running = _Running(Step(optimizer), observers)
        _running[optimizer] = running
        running.begin()
        return _with_closure(running, args, kwargs) or (args, kwargs)
    if running.step.evaluations:
        return None  # `super().step()` of an optimizer that has called the closure by itself
    return _with_closure(running, args, kwargs)


def _with_closure(running: _Running, args: Any, kwargs: Any) -> Arguments | None:
    """Let the gradients be ready now, or after each call of the closure among the arguments."""
    given = [*args[1:], *kwargs.values()]
    closure = next((one for one in given if callable(one)), None)
    if closure is None:
        running.ready()
        return None
    if isinstance(closure, _Closure):
        return None
    closing = _Closure(closure, running)
    changed = tuple(closing if one is closure else one for one in args)
    return changed, {k: closing if one is closure else one for k, one in kwargs.items()}


def _end(optimizer: Optimizer) -> None:
    running = _running.get(optimizer)
    if running is None or steps_on_stack(optimizer) > 1:
        return
    if not running.step.evaluations and type(optimizer) not in _ignored_closures:
        _ignored_closures.add(type(optimizer))
        log.warning(
            "fedpara: %s was given a closure and did not call it, so the options clip, decay and "
            "schedule did not act on its step: call step() without a closure",
            type(optimizer).__name__,
        )
    running.end(completed=True)


def _overflowed(optimizer: Optimizer) -> bool:
    """Return whether a fused optimizer will skip this step, since scaled gradients overflowed."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found)


def _unscaled(optimizer: Optimizer, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Unscale the gradients of an optimizer that would ask the scaler for it, inside its step.

    Returns:
        The arguments of the step, with a scaler of factor 1 in the other's place if there is one.
    """
    scaler = kwargs.get("grad_scaler")
    gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
    if not isinstance(scaler, torch.amp.GradScaler) or not scaler.is_enabled() or not gradients:
        return kwargs
    with suppress(RuntimeError):  # the user may have done so already
        scaler.unscale_(optimizer)
    device = gradients[0].device
    unit = torch.amp.GradScaler(device.type, init_scale=1.0)
    unit.scale(torch.ones((), device=device))  # before that, it has no factor
    return {**kwargs, "grad_scaler": unit}


def _are_finite(optimizer: Optimizer) -> bool:
    gradients = (p.grad for p in parameters_of(optimizer) if p.grad is not None)
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)


def _steps_by_another(optimizer: Optimizer) -> bool:
    """Return whether the optimizer wraps another one of the same parameters, which has hooks too.

    SAM, Lookahead and the like do. Acting on both would act twice.
    """
    inner = [one for one in _optimizers_in(optimizer) if one is not optimizer]
    if not inner:
        return False
    own = {id(parameter) for parameter in parameters_of(optimizer)}
    return any(id(parameter) in own for one in inner for parameter in parameters_of(one))


def _optimizers_in(optimizer: Optimizer) -> Iterator[Optimizer]:
    for value in vars(optimizer).values():
        several = type(value) in (list, tuple, dict)
        for one in (value.values() if type(value) is dict else value) if several else (value,):
            if isinstance(one, Optimizer):
                yield one


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
