"""The kinds of lines that a ledger holds, each checked at construction.

Sizes are bytes; ``docs/ledger.md`` specifies the format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias

__all__ = [
    "KINDS",
    "Direction",
    "Evaluation",
    "LayerSize",
    "LedgerEntry",
    "LedgerLine",
    "RunStart",
]

Direction = Literal["up", "down"]

LIMIT = 2**63
"""Integers stay below it: a larger one is no size, and other languages could not read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One message.

    Attributes:
        round: number of the round, as the framework counts.
        kind: purpose of the message: ``train``, ``evaluate``, or the framework's word.
        direction: ``up`` (client to server) or ``down``.
        client: the client's name or number, as text.
        tensors: number of tensors in the message.
        raw_bytes: bytes of these tensors before encoding.
        encoded_bytes: bytes of the payload as it was sent.
        dense_bytes: bytes of the dense model's tensors that stand behind them, before encoding; 0
            if unknown.

    Raises:
        ValueError, TypeError: the direction is another word, a field has another type, or a number
            is negative or needs more than 63 bits.
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
    """One metric of the model.

    Attributes:
        round: the round after which the model was evaluated; 0 is before any training.
        source: ``server`` for the global model on the server's data, ``clients`` for the mean over
            the clients, or another word.
        metric: the metric's name, such as ``accuracy``.
        value: the metric's value; None if it was NaN or infinite.

    Raises:
        ValueError, TypeError: a field has another type or is out of range.
    """

    round: int
    source: str
    metric: str
    value: float | None

    def __post_init__(self) -> None:
        value: Any = self.value  # a file may hold any type
        if type(value) is int:
            value = float(value) if abs(value) < LIMIT else math.inf
        if type(value) is float and not math.isfinite(value):
            value = None
        object.__setattr__(self, "value", value)
        _check(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSize:
    """The size of a layer in one whole-model message, before encoding.

    The encoded message is one stream over all layers, so that no encoded byte belongs to one layer.

    Attributes:
        layer: the layer's name in the model; empty for tensors of the model itself.
        tensors: number of its shared tensors.
        raw_bytes: bytes of these tensors.
        dense_bytes: bytes of the dense layer's tensors; 0 if unknown.

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
    """The settings of a run at its start.

    Attributes:
        version: version of fedpara-plugins.
        method: the config's method.
        codec: the config's codec.

    Raises:
        TypeError: a field has another type.
    """

    version: str
    method: str
    codec: str

    def __post_init__(self) -> None:
        _check(self)


LedgerLine: TypeAlias = LedgerEntry | Evaluation | LayerSize | RunStart

KINDS: dict[str, type[LedgerEntry] | type[Evaluation] | type[LayerSize] | type[RunStart]] = {
    "message": LedgerEntry,
    "evaluation": Evaluation,
    "layer": LayerSize,
    "run": RunStart,
}
"""Kinds by the word in a line's field ``line``; a line without that field is a message."""

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
