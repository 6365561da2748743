"""The kinds of lines that a ledger holds, each checked when it is made.

Sizes are bytes; docs/ledger.md is the format's specification.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

__all__ = ["KINDS", "Direction", "Evaluation", "LayerSize", "LedgerEntry", "Line", "RunStart"]

Direction = Literal["up", "down"]

LIMIT = 2**63
"""Numbers stay below it: a wider one is no size, and other languages could not read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One message.

    Attributes:
        round: of the run, counted as the framework counts.
        kind: what the message was for: ``train``, ``evaluate``, or the framework's word.
        direction: ``up`` (client to server) or ``down``.
        client: the client's name or number, as text.
        tensors: how many the message shares.
        raw_bytes: of the shared tensors before coding.
        encoded_bytes: of the payload as it was sent.
        dense_bytes: what the same tensors of the dense model would have taken, uncoded; 0 if that
            is not known.

    Raises:
        ValueError, TypeError: the direction is another word, or a field has another type, or a
            number is negative or needs more than 63 bits.
    """

    round: int
    kind: str
    direction: Direction
    client: str
    tensors: int
    raw_bytes: int
    encoded_bytes: int
    dense_bytes: int = 0

    def __post_init__(self) -> None:
        if self.direction not in ("up", "down"):
            raise ValueError(f"direction: expected 'up' or 'down', got {self.direction!r}")
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One figure of how good the model is.

    Attributes:
        round: after which it was taken; 0 is before any training.
        source: ``server`` for the global model on the server's data, ``clients`` for the mean over
            the clients, or another word.
        metric: the figure's name, ``accuracy`` for one.
        value: the figure; None if it was NaN or infinite.

    Raises:
        ValueError, TypeError: a field has another type or is out of range.
    """

    round: int
    source: str
    metric: str
    value: float | None

    def __post_init__(self) -> None:
        value: Any = self.value  # whatever a file holds
        if type(value) is int:
            value = float(value) if abs(value) < LIMIT else math.inf
        if type(value) is float and not math.isfinite(value):
            value = None
        object.__setattr__(self, "value", value)
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSize:
    """What one whole-model message carries of a layer, before coding.

    The coded message is one stream over all layers, so that no coded byte belongs to one layer.

    Attributes:
        layer: its name in the model; empty for tensors that stand in the model itself.
        tensors: how many of it are shared.
        raw_bytes: of these.
        dense_bytes: of the dense layer's tensors; 0 if not known.

    Raises:
        ValueError, TypeError: a field has another type or is out of range.
    """

    layer: str
    tensors: int
    raw_bytes: int
    dense_bytes: int = 0

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStart:
    """What a run was set to when it began to write.

    Attributes:
        version: of fedpara-plugins.
        method: of the config.
        codec: of the config.

    Raises:
        TypeError: a field has another type.
    """

    version: str
    method: str
    codec: str

    def __post_init__(self) -> None:
        _check(self)


Line: TypeAlias = LedgerEntry | Evaluation | LayerSize | RunStart

KINDS: dict[str, type[LedgerEntry] | type[Evaluation] | type[LayerSize] | type[RunStart]] = {
    "message": LedgerEntry,
    "evaluation": Evaluation,
    "layer": LayerSize,
    "run": RunStart,
}
"""By the word that stands in a line's field ``line``; a line without it is a message."""

_INTEGERS = {kind: [f.name for f in fields(kind) if f.type == "int"] for kind in KINDS.values()}
_TEXTS = {
    kind: [f.name for f in fields(kind) if f.type in ("str", "Direction")]
    for kind in KINDS.values()
}


def _check(line: Any) -> None:
    for name in _INTEGERS[type(line)]:
        number = getattr(line, name)
        if type(number) is not int:
            raise TypeError(f"{name}: expected int, got {number!r}")
        if not 0 <= number < LIMIT:
            got = number if abs(number) < 2 * LIMIT else f"one of {number.bit_length()} bits"
            raise ValueError(f"{name}: expected a number from 0 to 2**63 - 1, got {got}")
    for name in _TEXTS[type(line)]:
        if type(getattr(line, name)) is not str:
            raise TypeError(f"{name}: expected text, got {getattr(line, name)!r}")
    value = getattr(line, "value", None)
    if value is not None and type(value) is not float:
        raise TypeError(f"value: expected a number or null, got {value!r}")
