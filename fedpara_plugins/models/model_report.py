"""What a conversion did: a row per weight, and what was left alone and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.personal import ADDED, PersonalLinear
from fedpara_plugins.models.attached_config import config_of
from fedpara_plugins.models.decisions import Decision, decisions
from fedpara_plugins.models.spec import ModelSpec

__all__ = ["Report", "ReportRow", "report"]

_HEAD = ("layer", "kind", "shape", "rank", "dense", "now", "bytes dense", "bytes sent", "note")


@dataclass(frozen=True, kw_only=True)
class ReportRow:
    """One weight, or what else a layer holds.

    Attributes:
        name: full name of the weight, or of the layer.
        kind: of the layer.
        shape: of the dense weight; () for a row that sums up several tensors.
        rank: of the factors; None if dense.
        dense_parameters: what the unconverted model has here.
        parameters: what the model has here now, private factors included.
        shared_bytes: what of it travels uncoded, buffers included.
        dense_bytes: what of the unconverted model would travel, buffers included.
        note: the method, or the reason why this stays dense.
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


@dataclass(frozen=True)
class Report:
    """The rows and their totals; ``str(report)`` is a table."""

    rows: tuple[ReportRow, ...]

    @property
    def dense_parameters(self) -> int:
        """Parameters of the unconverted model."""
        return sum(row.dense_parameters for row in self.rows)

    @property
    def parameters(self) -> int:
        """Parameters of the model, private factors included."""
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
        return "\n".join([*lines, total])


def report(model: nn.Module) -> Report:
    """Rows for every layer that has parameters or buffers, in the model's order.

    For a model that was never converted every row says so. A tensor that several layers share is
    one of the model's parameters, counted where it first stands; its bytes are counted everywhere,
    since a state, and so a message, holds it under each name.
    """
    seen: set[int] = set()
    rows: list[ReportRow] = []
    kept = frozenset(ModelSpec.of(model).own)
    for decision in decisions(model, config_of(model)):
        if isinstance(decision.layer, FactorisedLayer):
            rows.extend(_factorised_rows(decision.name, decision.layer))
        rows.extend(_remaining_row(decision, seen, kept))
        if isinstance(decision.layer, PersonalLinear):
            rows.extend(_head_rows(decision.name, decision.layer))
    return Report(tuple(rows))


def _factorised_rows(name: str, layer: FactorisedLayer) -> Iterator[ReportRow]:
    for weight, plan in layer.plans.items():
        item = next(iter(layer.factors(weight).values())).element_size()
        dense = prod(plan.shape)
        yield ReportRow(
            name=_join(name, weight),
            kind=_kind(layer),
            shape=plan.shape,
            rank=plan.rank,
            dense_parameters=dense,
            parameters=plan.parameters,
            shared_bytes=plan.shared_parameters * item,
            dense_bytes=dense * item,
            note=_method_note(plan, layer.fit_errors.get(weight)),
        )


def _head_rows(name: str, layer: PersonalLinear) -> Iterator[ReportRow]:
    """What stands in the model beside what the dense model has, and never travels."""
    for added, value in layer.added.items():
        yield ReportRow(
            name=_join(name, added),
            kind=_kind(layer),
            shape=tuple(value.shape),
            rank=None,
            dense_parameters=0,
            parameters=value.numel(),
            shared_bytes=0,
            dense_bytes=0,
            note=f"private, added to {ADDED[added]} of the head",
        )


def _remaining_row(decision: Decision, seen: set[int], kept: frozenset[str]) -> Iterator[ReportRow]:
    layer = decision.layer
    factors: set[int] = set()
    if isinstance(layer, FactorisedLayer):
        factors = {id(f) for weight in layer.plans for f in layer.factors(weight).values()}
    apart = layer.added if isinstance(layer, PersonalLinear) else {}
    own = {k: p for k, p in layer._parameters.items() if p is not None and k not in apart}
    own = {k: p for k, p in own.items() if id(p) not in factors}
    rest = {k: p for k, p in own.items() if id(p) not in seen}
    seen.update(id(p) for p in rest.values())
    entries = sum(p.numel() for p in rest.values())
    tensors = {**own, **_buffers(layer)}
    size = sum(map(_bytes, tensors.values()))
    if not rest and not size:
        return
    private = [key for key in tensors if _join(decision.name, key) in kept]
    yield ReportRow(
        name=_join(decision.name, "+".join(rest or own)) if factors else decision.name,
        kind=_kind(layer),
        shape=tuple(next(iter(rest.values())).shape) if len(rest) == 1 else (),
        rank=None,
        dense_parameters=entries,
        parameters=entries,
        shared_bytes=size - sum(_bytes(tensors[key]) for key in private),
        dense_bytes=size,
        note=_dense_note(decision) + (f" (private: {', '.join(private)})" if private else ""),
    )


def _buffers(layer: nn.Module) -> dict[str, Tensor]:
    skipped = layer._non_persistent_buffers_set
    return {k: b for k, b in layer._buffers.items() if b is not None and k not in skipped}


def _dense_note(decision: Decision) -> str:
    if decision.reasons:
        several = len(decision.reasons) > 1 or decision.plans
        texts = [f"{k}: {v}" if k and several else v for k, v in decision.reasons.items()]
        return "dense: " + "; ".join(texts)
    return "dense: nothing to save in a vector"


def _method_note(plan: WeightPlan, fit_error: float | None) -> str:
    private = plan.parameters - plan.shared_parameters
    notes = [plan.method.name]
    if private:
        notes.append(f"{private:,} private")
    if fit_error is not None:
        notes.append(f"fitted with relative error {fit_error:.3f}")
    return ", ".join(notes)


def _cells(row: ReportRow) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "-"
    rank = "-" if row.rank is None else str(row.rank)
    counts = (row.dense_parameters, row.parameters, row.dense_bytes, row.shared_bytes)
    numbers = (f"{n:,}" for n in counts)
    return (row.name or "(model)", row.kind, shape, rank, *numbers, row.note)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _kind(layer: nn.Module) -> str:
    dense = layer.dense_class if isinstance(layer, FactorisedLayer) else type(layer)
    return dense.__name__
