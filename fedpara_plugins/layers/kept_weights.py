"""Composed weights that are kept for several forwards, where the user asks for it.

Some changes of factors cannot be noticed (through ``.data``, through a numpy view). Therefore a
weight outlives its forward only inside the context `composed_once`, which the user opens.
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
from torch.compiler import is_compiling

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.factors.fast.conditions import may_run, without_autocast
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.support.torch_seams import is_tracing, saved_tensors_hooks_are_enabled

__all__ = [
    "composed_once",
    "drop_before_step",
    "drop_kept_weights",
    "has_kept_weights",
    "kept_weight",
]


class ComposingLayer(Protocol):
    """A layer whose weights are composed from its parameters, as `FactorisedLayer` is."""

    training: bool
    _parameters: dict[str, nn.Parameter | None]

    @property
    def plans(self) -> Mapping[str, WeightPlan]:
        """The factorised weights, by attribute."""

    @property
    def phase(self) -> str:
        """Which factors the next training step moves."""

    @property
    def factor_key(self) -> Callable[[str, str], str]:
        """The function from weight and factor to the parameter's name."""

    def factors(self, weight: str) -> Mapping[str, Tensor]:
        """Return a weight's factors by name."""

    def factors_now(self, weight: str) -> Mapping[str, Tensor]:
        """Return the factors to compose, as the present phase of training sees them."""

    def base(self, weight: str) -> Tensor | None:
        """Return W0 of the residual form, or None."""

    def compose_from(self, weight: str, factors: Mapping[str, Tensor]) -> Tensor:
        """Compose a weight from its factors."""


class _Factor(NamedTuple):
    """A factor and its state when it composed a weight."""

    name: str
    tensor: Tensor
    version: int
    trained: bool


class _KeptWeight(NamedTuple):
    """A composed weight, its factors' states, and in training the graph that it is cut from."""

    value: Tensor
    factors: tuple[_Factor, ...]
    grad: bool
    phase: str
    graph: Tensor | None


def _pull_back(value: Tensor, factors: Sequence[_Factor], graph: Tensor | None) -> None:
    """Propagate the gradient that a weight has accumulated to its factors."""
    _pull_back_all([_KeptWeight(value, tuple(factors), True, "", graph)])


def _pull_back_all(kept: Iterable[_KeptWeight]) -> None:
    """Propagate the gradients of weights, in one backward pass: hooks may step optimizers in it."""
    waiting = [one for one in kept if one.value.grad is not None]
    for _, tensor, version, trained in (factor for one in waiting for factor in one.factors):
        if tensor._version != version or (trained and not tensor.requires_grad):
            raise ConversionError(
                "factors were changed or frozen inside `composed_once` while gradients of the "
                "weights that they composed were waiting: do so, or load a state, outside of it"
            )
    if not waiting:
        return
    gradients = [one.value.grad for one in waiting]
    for one in waiting:
        one.value.grad = None
    graphs = [one.graph for one in waiting if one.graph is not None]
    torch.autograd.backward(graphs, gradients, retain_graph=True)


class composed_once:  # noqa: N801  (reads like `torch.no_grad` where it is used)
    """Context in which each weight of a model is composed once, at its first use.

    It serves evaluation, and several backward passes before one optimizer step. Gradients
    accumulate at the composed weights and reach the factors' ``.grad`` when the context is left;
    those of a later backward pass reach them at once. Parameters that are no factors get their
    gradients as usual. While the context is open, it holds every weight and, in training, its
    gradient.

    A weight is composed again when its factors were replaced, frozen or changed in place: after an
    optimizer's step, ``load_state_dict`` and ``model.to(dtype)``, and inside ``functional_call``.
    Copies of the model compose their own weights. **Changes through** ``.data`` **and through
    numpy views are not noticed**: make none inside the context.

    Factors have no gradients of their own while the context is open. Call ``zero_grad()``, and
    ``torch.autograd.grad`` or ``backward(inputs=...)`` with respect to factors, outside of it.

    Args:
        model: a converted model; other models work unchanged.

    Raises:
        ConversionError: an optimizer steps, or factors change, while gradients are waiting; or
            this object is open already.

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
        # By the context's thread, layer and weight; an entry for each mode it was composed in.
        self._kept: dict[tuple[int, int, str], list[_KeptWeight]] = {}
        self._trained: list[_KeptWeight] = []
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
        if kind is None:
            _pull_back_all(trained)
        for value, factors, _, _, graph in trained:
            # The hook must not refer to the value, which holds the hook: neither would be freed.
            register = value.register_post_accumulate_grad_hook
            register(partial(_pull_back, factors=factors, graph=graph))  # type: ignore[no-untyped-call]

    def has_gradients(self) -> bool:
        """Return whether weights have accumulated gradients."""
        return any(kept.value.grad is not None for kept in self._trained)

    def drop(self, layer: ComposingLayer) -> None:
        """Compose a layer's weights again at their next use."""
        for name in layer.plans:
            self._kept.pop((self._thread, id(layer), name), None)

    def compose(self, layer: ComposingLayer, name: str) -> Tensor | None:
        """Compose a weight and keep it; return None where each use must compose it."""
        factors = layer.factors(name)
        if not may_run(list(factors.values())) or any(f.is_inference() for f in factors.values()):
            return None
        kept = _compose(layer, name, factors)
        key = (self._thread, id(layer), name)
        mode = (kept.grad, kept.phase)
        others = [k for k in self._kept.get(key, ()) if (k.grad, k.phase) != mode]
        self._kept[key] = [kept, *others]
        if kept.graph is not None:
            self._trained.append(kept)
        return kept.value


def kept_weight(layer: ComposingLayer, name: str) -> Tensor | None:
    """Return the weight that an open context keeps for a layer; None if it must be composed."""
    # This runs before each use of a weight, with cold caches, so it takes as few steps as possible:
    # private attributes of torch are read without a function (see `torch_seams.HOT_ATTRIBUTES`).
    # A trace would keep the weight for ever.
    if not _open or is_compiling() or is_tracing():
        return None
    key = (get_ident(), id(layer), name)
    try:
        once = _open[-1]
        found = once._kept[key]
    except (IndexError, KeyError):  # the last one is another model's, or keeps nothing yet
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


def has_kept_weights(layer: ComposingLayer) -> bool:
    """Return whether an open context keeps the layer's weights."""
    if not _open or is_compiling():
        return False
    return _innermost(layer) is not None


def drop_before_step(layers: Iterable[ComposingLayer]) -> None:
    """Drop the weights of layers that an optimizer is about to change.

    Raises:
        ConversionError: gradients are waiting that this step would miss.
    """
    for layer in layers:
        drop_kept_weights(layer)  # fused optimizers change factors without changing their versions
        once = _innermost(layer)
        if once is not None and once.has_gradients():
            raise ConversionError(
                "an optimizer steps inside `composed_once`, but factors get their gradients when "
                "the context is left: call optimizer.step() after it"
            )


def drop_kept_weights(layer: ComposingLayer) -> None:
    """Compose a layer's weights again at their next use, in every open context."""
    for once in tuple(_open):
        once.drop(layer)


_open: list[composed_once] = []
"""Contexts of all threads; the innermost of each thread comes last.

There is no lock. Another thread's change can hide a context of this one for a single look at most,
and then a weight is composed once more.
"""


def _innermost(layer: object) -> composed_once | None:
    """Return the innermost open context of this thread that holds the layer, or None."""
    if _open:
        thread = get_ident()
        for once in reversed(_open):
            if id(layer) in once._layers and once._thread == thread:
                return once
    return None


def _compose(layer: ComposingLayer, name: str, factors: Mapping[str, Tensor]) -> _KeptWeight:
    tensors = {layer.factor_key(name, f): t for f, t in factors.items()}
    base, key = layer.base(name), layer.plans[name].base_key
    if base is not None and key is not None:
        tensors[key] = base
    states = tuple(_Factor(k, t, t._version, t.requires_grad) for k, t in tensors.items())
    phase = layer.phase if layer.training else "joint"
    grad = is_grad_enabled()
    device = next(iter(factors.values())).device.type
    with without_autocast(device), _without_saved_tensors_hooks() if grad else nullcontext():
        graph = layer.compose_from(name, layer.factors_now(name))
    if not graph.requires_grad:
        return _KeptWeight(graph, states, grad, phase, None)
    return _KeptWeight(graph.detach().requires_grad_(), states, grad, phase, graph)


def _without_saved_tensors_hooks() -> AbstractContextManager[Any]:
    """Return a context that hides saved tensors from an open `torch.utils.checkpoint`.

    A checkpoint counts them. When it runs again, the weight is kept and saves none.
    """
    if not saved_tensors_hooks_are_enabled():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
