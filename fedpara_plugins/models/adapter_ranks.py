"""Ranks of two adapters whose tensors do not fit, told by the shapes that differ."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedpara_plugins.models.adapters import in_adapter

__all__ = ["rank_conflict", "rank_hint"]

_MISFIT = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\(\[([\d, ]+)\]\) from "
    r"checkpoint, the shape in current model is torch\.Size\(\[([\d, ]+)\]\)"
)
"""What torch's ``load_state_dict`` says of a tensor of another shape (torch 2.4 to 2.14)."""


def rank_conflict(name: str, mine: Sequence[int], other: Sequence[int]) -> tuple[int, int] | None:
    """Return the ranks of two adapters; None if it is something else that differs.

    Args:
        name: of a tensor in both states.
        mine: its shape in one of them.
        other: its shape in the other; the two differ.
    """
    if not in_adapter(name) or len(mine) != len(other):
        return None
    unlike = [pair for pair in zip(mine, other, strict=True) if pair[0] != pair[1]]
    return unlike[0] if len(unlike) == 1 else None


def rank_hint(error: Exception) -> str | None:
    """Return what to do if a client's model cannot load the server's adapter for its rank.

    Args:
        error: raised by the user's code.
    """
    for name, sent, own in _MISFIT.findall(str(error)):
        shapes = [[int(size) for size in shape.split(",")] for shape in (own, sent)]
        if ranks := rank_conflict(name, *shapes):
            return (
                f"fedpara: the adapter of this client's model has rank {ranks[0]}, the server's "
                f"has rank {ranks[1]} (the first of its tensors is {name!r}). Factors of different "
                f"ranks have no average: build adapters of the same rank on both sides"
            )
    return None
