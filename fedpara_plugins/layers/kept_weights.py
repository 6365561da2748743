"""Compose every weight once for several forwards, where the user says so.

Factors can be changed in ways that nothing can notice (through ``.data``, through a numpy view), so
a weight that outlives its forward is never kept behind a user's back: only inside this context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from threading import get_ident
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, is_grad_enabled, nn
from torch._C import _is_tracing
from torch.compiler import is_compiling

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.factors.fast.conditions import may_run, without_autocast
from fedpara_plugins.factors.plan import WeightPlan

__all__ = ["before_step", "composed_once", "forget", "holds", "kept_weight"]


class ComposingLayer(Protocol):
    """What a `FactorisedLayer` is here: a layer whose weights are composed from its parameters."""

    training: bool
    _parameters: dict[str, nn.Parameter | None]

    @property
    def plans(self) -> Mapping[str, WeightPlan]:
        """Its factorised weights, by attribute."""

    @property
    def phase(self) -> str:
        """What training steps move now."""

    @property
    def factor_key(self) -> Callable[[str, str], str]:
        """From weight and factor to the parameter's name."""

    def factors(self, weight: str) -> Mapping[str, Tensor]:
        """Return a weight's factors by name."""

    def factors_now(self, weight: str) -> Mapping[str, Tensor]:
        """Return them as the present phase of training sees them."""


class _Factor(NamedTuple):
    """A factor as it was when it composed a weight."""

    name: str
    tensor: Tensor
    version: int
    trained: bool


class _Kept(NamedTuple):
    """A composed weight, what its factors were, and (in training) the graph it was cut from."""

    value: Tensor
    factors: tuple[_Factor, ...]
    grad: bool
    phase: str
    graph: Tensor | None


def _pull_back(value: Tensor, factors: Sequence[_Factor], graph: Tensor | None) -> None:
    """Take the gradient that a weight has collected to its factors."""
    if graph is None or value.grad is None:
        return
    for _, tensor, version, trained in factors:
        if tensor._version != version or (trained and not tensor.requires_grad):
            raise ConversionError(
                "factors were changed or frozen inside `composed_once` while gradients of the "
                "weights that they composed were waiting: do so, or load a state, outside of it"
            )
    gradient, value.grad = value.grad, None
    graph.backward(gradient, retain_graph=True)  # type: ignore[no-untyped-call]


class composed_once:  # noqa: N801  (reads like `torch.no_grad` where it is used)
    """Compose each weight of a model at its first use inside the context, and use it again.

    For evaluation, and for several backward passes that one optimizer step follows: gradients are
    collected at the composed weights, and taken to the factors' ``.grad`` when the context is left
    (those of a backward pass that comes later, at once). Parameters that are no factors get theirs
    as ever. While the context is open, it holds every weight, and in training its gradient.

    A weight whose factors were replaced, frozen, or changed in place since is composed anew, also
    after an optimizer's step, ``load_state_dict`` and ``model.to(dtype)``, and inside
    ``functional_call``; copies of the model compose for themselves. **Not noticed are changes
    through** ``.data`` **and through numpy views**: make none inside.

    Factors have no gradients of their own while the context is open: call ``zero_grad()`` and
    ``torch.autograd.grad`` or ``backward(inputs=...)`` by factors outside of it.

    Args:
        model: a converted model; all others pass unchanged.

    Raises:
        ConversionError: an optimizer steps, or factors change, while gradients are waiting; or
            this very object is open already.

    Example:
        >>> model = convert(nn.Linear(64, 64), method="fedpara")
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with composed_once(model):
        ...     for batch in torch.ones(4, 2, 64):
        ...         model(batch).square().mean().backward()
        >>> optimizer.step()                     # outside: now the factors have their gradients
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers: dict[int, nn.Module] = {}
        # By thread (the context's own), layer and weight: what was composed, in each state once.
        self._kept: dict[tuple[int, int, str], list[_Kept]] = {}
        self._trained: list[_Kept] = []
        self._thread = 0

    def __enter__(self) -> composed_once:
        if self in _open:
            raise ConversionError("this `composed_once` is open already: make another one")
        self._layers = {id(layer): layer for layer in self._model.modules()}
        self._kept, self._trained = {}, []
        self._thread = get_ident()
        _open.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _open.remove(self)
        trained, self._kept, self._layers, self._trained = self._trained, {}, {}, []
        for value, factors, _, _, graph in trained:
            if kind is None:
                _pull_back(value, factors, graph)
            # The hook must not hold the value: torch holds the hook, and neither would ever go.
            late = value.register_post_accumulate_grad_hook
            late(partial(_pull_back, factors=factors, graph=graph))  # type: ignore[no-untyped-call]

    def waits(self) -> bool:
        """Whether weights have collected gradients."""
        return any(kept.value.grad is not None for kept in self._trained)

    def forget(self, layer: ComposingLayer) -> None:
        """Compose a layer's weights anew at their next use."""
        for name in layer.plans:
            self._kept.pop((self._thread, id(layer), name), None)

    def compose(self, layer: ComposingLayer, name: str) -> Tensor | None:
        """Compose a weight and hold it; None where it must be composed at each use."""
        factors = layer.factors(name)
        if not may_run(list(factors.values())) or any(f.is_inference() for f in factors.values()):
            return None
        kept = _compose(layer, name, factors)
        key = (self._thread, id(layer), name)
        state = (kept.grad, kept.phase)
        others = [k for k in self._kept.get(key, ()) if (k.grad, k.phase) != state]
        self._kept[key] = [kept, *others]
        if kept.graph is not None:
            self._trained.append(kept)
        return kept.value


def kept_weight(layer: ComposingLayer, name: str) -> Tensor | None:
    """The weight of a layer that an open context holds; None where it is to be composed."""
    # This runs before each use of a weight, with everything that it touches out of the caches: what
    # can be asked in fewer steps is. A trace would keep the weight for ever.
    if not _open or is_compiling() or _is_tracing():
        return None
    key = (get_ident(), id(layer), name)
    try:
        once = _open[-1]
        found = once._kept[key]
    except (IndexError, KeyError):  # the last one is another's, or keeps nothing yet
        innermost = _innermost(layer)
        if innermost is None:
            return None
        once = innermost
        found = once._kept.get(key, [])
    parameters, grad = layer._parameters, is_grad_enabled()
    phase = layer.phase if layer.training else "joint"
    for value, factors, was_grad, was_phase, _ in found:
        if was_grad is grad and was_phase == phase:
            for factor_name, factor, version, trained in factors:
                if (
                    factor._version != version
                    or parameters.get(factor_name) is not factor
                    or (grad and factor.requires_grad is not trained)
                ):
                    break
            else:
                return value
    return once.compose(layer, name)


def holds(layer: ComposingLayer) -> bool:
    """Whether an open context holds the layer's weights."""
    if not _open or is_compiling():
        return False
    return _innermost(layer) is not None


def before_step(layers: Iterable[ComposingLayer]) -> None:
    """Forget the weights of layers that an optimizer is about to change.

    Raises:
        ConversionError: gradients are waiting, and a step now would go without them.
    """
    for layer in layers:
        forget(layer)  # fused optimizers change factors and leave their versions as they were
        once = _innermost(layer)
        if once is not None and once.waits():
            raise ConversionError(
                "an optimizer steps inside `composed_once`, but factors get their gradients when "
                "the context is left: call optimizer.step() after it"
            )


def forget(layer: ComposingLayer) -> None:
    """Compose a layer's weights anew at their next use, in every open context."""
    for once in tuple(_open):
        once.forget(layer)


_open: list[composed_once] = []
"""Of all threads, the innermost of each last. Without a lock: what another thread does meanwhile
cannot hide a context of this one for more than one look, and then a weight is composed anew."""


def _innermost(layer: object) -> composed_once | None:
    """The innermost open context of this thread that holds the layer; None without one."""
    if _open:
        thread = get_ident()
        for once in reversed(_open):
            if id(layer) in once._layers and once._thread == thread:
                return once
    return None


def _compose(layer: ComposingLayer, name: str, factors: Mapping[str, Tensor]) -> _Kept:
    known = tuple(
        _Factor(layer.factor_key(name, f), t, t._version, t.requires_grad)
        for f, t in factors.items()
    )
    phase = layer.phase if layer.training else "joint"
    grad = is_grad_enabled()
    device = next(iter(factors.values())).device.type
    with without_autocast(device), _saved_as_they_are() if grad else nullcontext():
        graph = layer.plans[name].compose(layer.factors_now(name))
    if not graph.requires_grad:
        return _Kept(graph, known, grad, phase, None)
    return _Kept(graph.detach().requires_grad_(), known, grad, phase, graph)


def _saved_as_they_are() -> AbstractContextManager[Any]:
    """A checkpoint that is open counts what it saves, and runs again when the weight is kept."""
    if not torch._C._autograd._saved_tensors_hooks_is_enabled():  # type: ignore[attr-defined]
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
