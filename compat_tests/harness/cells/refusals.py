"""Cells that cannot run: who refuses them, and in which words. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from harness.cells.base import Cell
from harness.cells.strategies import STRATEGIES

__all__ = ["Refusal", "refusal"]

SCALARS_REFUSED = ("fedavg", "fedprox", "qfedavg", "krum", "multikrum")
"""Strategies that take arrays without dimensions, which BatchNorm has, before Flower 1.28 too."""

SCALARS_SINCE = (1, 28)


@dataclass(frozen=True)
class Refusal:
    """How a run ends instead of training.

    Attributes:
        by: ``plugin``, which says what to do; or ``Flower``, where the plugin is off.
        words: stand in the error, or in the log where Flower swallows it.
        raises: whether the ServerApp ends with an error; else no round is aggregated.
        sends: whether any message has gone out before.
    """

    by: str
    words: str
    raises: bool = True
    sends: bool = True


def refusal(cell: Cell, version: str) -> Refusal | None:
    """Return what is expected instead of a result; None if the cell trains.

    Args:
        cell: the cell.
        version: version of Flower.
    """
    spec = STRATEGIES[cell.strategy]
    if spec.client_mod and not cell.exact:
        return Refusal("plugin", "breaks the bound", sends=False)
    if cell.model == "groupnorm":
        return None
    if spec.client_mod and not cell.plain:
        return Refusal("plugin", "cannot clip")
    if cell.strategy == "qfedavg" and cell.plain:
        return Refusal("Flower", "ufunc 'multiply'")
    old = tuple(map(int, version.split(".")[:2])) < SCALARS_SINCE
    if old and cell.strategy not in SCALARS_REFUSED:
        if cell.plain:
            return Refusal("Flower", "Invalid arguments for Array", raises=not spec.client_mod)
        return Refusal("plugin", "arrays without dimensions")
    return None
