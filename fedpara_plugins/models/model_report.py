"""The report about a model: a row per weight, with the reason where it stayed dense."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.base import full_name, own_keys
from fedpara_plugins.layers.personal import ADDED, PersonalLinear
from fedpara_plugins.models.attached_config import config_of
from fedpara_plugins.models.first_values import fit_summary
from fedpara_plugins.models.layer_decisions import LayerDecision, decide_layers
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.support.torch_seams import own_parameters, persistent_buffers

__all__ = ["Report", "ReportRow", "report"]

_HEAD = ("layer", "kind", "shape", "rank", "dense", "now", "bytes dense", "bytes sent", "note")


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One factorised weight, or the remaining tensors of a layer.

    Attributes:
        name: full name of the weight, or of the layer.
        kind: the layer's class in the dense model.
        shape: the dense weight's shape; () for a row about several tensors.
        rank: R of the factors; None if dense.
        dense_parameters: number of parameters in the unconverted model.
        parameters: number of parameters now, private factors and frozen weights included.
        shared_bytes: bytes that travel, uncoded, buffers included. Frozen weights of the residual
            form, which every client has, are not counted.
        dense_bytes: bytes that would travel of the unconverted model, buffers included.
        note: the method, or the reason why this stays dense.
        fit_error: |W - composed| / |W| of a fitted weight when it was fitted.
        fit_speed: K that the factors of a fitted weight reached.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int | None
    dense_parameters: int
    parameters: int
    shared_bytes: int
    dense_bytes: int
    note: str
    fit_error: float | None = None
    fit_speed: float | None = None


@dataclass(frozen=True)
class Report:
    """The rows and their totals. ``str(report)`` is a table."""

    rows: tuple[ReportRow, ...]

    @property
    def dense_parameters(self) -> int:
        """Number of parameters of the unconverted model."""
        return sum(row.dense_parameters for row in self.rows)

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, private factors included."""
        return sum(row.parameters for row in self.rows)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the unconverted model's state, uncoded."""
        return sum(row.dense_bytes for row in self.rows)

    @property
    def shared_bytes(self) -> int:
        """Bytes of the state that travels, uncoded."""
        return sum(row.shared_bytes for row in self.rows)

    def __str__(self) -> str:
        cells = [_HEAD, *(_cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(_HEAD) - 1)]
        lines = [
            "  ".join(
                text.rjust(width) if i >= 3 else text.ljust(width)
                for i, (text, width) in enumerate(zip(line[:-1], widths, strict=True))
            )
            + f"  {line[-1]}"
            for line in cells
        ]
        saved = self.dense_bytes / self.shared_bytes if self.shared_bytes else float("nan")
        total = (
            f"total: {self.dense_parameters:,} dense parameters, {self.parameters:,} now; "
            f"{self.dense_bytes:,} bytes dense, {self.shared_bytes:,} bytes sent "
            f"({saved:.1f} times fewer)"
        )
        errors = {row.name: row.fit_error for row in self.rows if row.fit_error is not None}
        return "\n".join([*lines, total, *filter(None, [fit_summary(errors)])])


def report(model: nn.Module) -> Report:
    """Return rows for every layer with parameters or buffers, in the model's order.

    Every row of an unconverted model says that it is dense. A parameter that several layers share
    is counted where it first occurs. Its bytes are counted everywhere, since a state, and therefore
    a message, holds it under each name.
    """
    seen: set[int] = set()
    rows: list[ReportRow] = []
    private = frozenset(ModelSpec.of(model).own)
    for decision in decide_layers(model, config_of(model)):
        if isinstance(decision.layer, FactorisedLayer):
            rows.extend(_factorised_rows(decision.name, decision.layer))
        rows.extend(_remaining_row(decision, seen, private))
        if isinstance(decision.layer, PersonalLinear):
            rows.extend(_head_rows(decision.name, decision.layer))
    return Report(tuple(rows))


def _factorised_rows(name: str, layer: FactorisedLayer) -> Iterator[ReportRow]:
    for weight, plan in layer.plans.items():
        base = layer.base(weight)
        item = layer.factors(weight)["x1"].element_size()
        dense = prod(plan.shape)
        yield ReportRow(
            name=full_name(name, weight),
            kind=_kind(layer),
            shape=plan.shape,
            rank=plan.rank,
            dense_parameters=dense,
            parameters=plan.parameters + (0 if base is None else dense),
            shared_bytes=plan.shared_parameters * item,
            dense_bytes=dense * (item if base is None else base.element_size()),
            note=_method_note(plan, layer, weight),
            fit_error=layer.fit_errors.get(weight),
            fit_speed=layer.fit_speeds.get(weight),
        )


def _head_rows(name: str, layer: PersonalLinear) -> Iterator[ReportRow]:
    """Yield rows of the head's private parameters, which the dense model does not have."""
    for added, value in layer.added.items():
        yield ReportRow(
            name=full_name(name, added),
            kind=_kind(layer),
            shape=tuple(value.shape),
            rank=None,
            dense_parameters=0,
            parameters=value.numel(),
            shared_bytes=0,
            dense_bytes=0,
            note=f"private, added to {ADDED[added]} of the head",
        )


def _remaining_row(
    decision: LayerDecision, seen: set[int], private: frozenset[str]
) -> Iterator[ReportRow]:
    """Yield a row of a layer's dense parameters and buffers, if there are any.

    Args:
        decision: about the layer.
        seen: ids of the parameters that earlier rows count; those of this row are added.
        private: full names of the private tensors that are no factors.
    """
    dense = _dense_parameters(decision.layer)
    counted = {k: p for k, p in dense.items() if id(p) not in seen}
    seen.update(id(p) for p in counted.values())
    entries = sum(p.numel() for p in counted.values())
    tensors = {**dense, **persistent_buffers(decision.layer)}
    size = sum(map(_bytes, tensors.values()))
    if not counted and not size:
        return
    kept = [key for key in tensors if full_name(decision.name, key) in private]
    factorised = isinstance(decision.layer, FactorisedLayer) and decision.plans
    names = "+".join(counted or dense) if factorised else ""
    yield ReportRow(
        name=full_name(decision.name, names),
        kind=_kind(decision.layer),
        shape=tuple(next(iter(counted.values())).shape) if len(counted) == 1 else (),
        rank=None,
        dense_parameters=entries,
        parameters=entries,
        shared_bytes=size - sum(_bytes(tensors[key]) for key in kept),
        dense_bytes=size,
        note=_dense_note(decision) + (f" (private: {', '.join(kept)})" if kept else ""),
    )


def _dense_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer that are neither factors nor the head's private ones."""
    excluded: set[int] = set()
    if isinstance(layer, FactorisedLayer):
        keys = (key for plan in layer.plans.values() for key in own_keys(plan))
        excluded = {id(layer.get_parameter(key)) for key in keys}
    if isinstance(layer, PersonalLinear):
        excluded |= {id(p) for p in layer.added.values()}
    own = own_parameters(layer).items()
    return {k: p for k, p in own if p is not None and id(p) not in excluded}


def _dense_note(decision: LayerDecision) -> str:
    if decision.reasons:
        several = len(decision.reasons) > 1 or decision.plans
        texts = [f"{k}: {v}" if k and several else v for k, v in decision.reasons.items()]
        return "dense: " + "; ".join(texts)
    return "dense: nothing to save in a vector"


def _method_note(plan: WeightPlan, layer: FactorisedLayer, weight: str) -> str:
    private = sum(prod(plan.factor_shape(name)) for name in plan.private_names)
    notes = [plan.method.name]
    if plan.residual:
        notes = [f"frozen, with an update by {plan.method.name}"]
    if plan.fixed_names:
        notes.append("of which X1 alone is trained")
    if private:
        notes.append(f"{private:,} private")
    if weight in layer.fit_errors:
        notes.append(f"fitted with relative error {layer.fit_errors[weight]:.3f}")
    if weight in layer.fit_speeds:
        notes.append(f"K {layer.fit_speeds[weight]:.2f}")
    if weight in layer.own_starts:
        notes.append(f"keeps its own standard deviation {layer.own_starts[weight]:.3g}")
    return ", ".join(notes)


def _cells(row: ReportRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "-"
    rank = "-" if row.rank is None else str(row.rank)
    counts = (row.dense_parameters, row.parameters, row.dense_bytes, row.shared_bytes)
    numbers = (f"{n:,}" for n in counts)
    return (row.name or "(model)", row.kind, shape, rank, *numbers, row.note)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kind(layer: nn.Module) -> str:
    dense = layer.dense_class if isinstance(layer, FactorisedLayer) else type(layer)
    return dense.__name__
