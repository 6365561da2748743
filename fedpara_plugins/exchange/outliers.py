"""Updates that are far outside of what the other clients of a round sent.

A finite update may still be absurd: float32 values of 1e30, or a training that ran away. It would
move the mean so far that in the next round every client diverges. The rule, with n the norms of a
round's updates (Euclidean, over all floating-point tensors), and both medians the lower ones:

    an update is far outside if   n_i > 10 median(n) + 10 median(|n - median(n)|)
                            and   n_i > 0.001 times the norm of what was sent

The medians are those of honest clients as long as at least half of the round's are. The second
condition lets a client train whose neighbours had next to nothing to learn. Two replies say nothing
about each other, so the rule needs three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median_low

import torch
from torch import Tensor

from fedpara_plugins.exchange.records import in_pieces

__all__ = ["Outliers", "far_outside", "update_norm"]

FACTOR = 10.0
"""Times the median, and times the median deviation from it."""

LEAST = 1e-3
"""Share of the norm of what was sent below which an update is never far outside."""

FEWEST = 3
"""Replies that the rule needs."""


def update_norm(answer: Mapping[str, Tensor], sent: Mapping[str, Tensor] | None = None) -> float:
    """Return the norm of an update, in float64, one tensor at a time.

    Args:
        answer: a model, as a client answers it.
        sent: the same tensors as they were sent; None for the norm of the model itself.
    """
    total = 0.0
    for name, value in answer.items():
        if value.is_floating_point() and (sent is None or name in sent):
            both = (value,) if sent is None else (value, sent[name])
            total += sum(_squares(*piece) for piece in in_pieces(*both))
    return float(total**0.5)


def _squares(new: Tensor, old: Tensor | None = None) -> float:
    """Return a difference's sum of squares; places that are not finite, as in a mask, count 0."""
    change = new.double() if old is None else new.double().sub_(old)
    found = float(torch.dot(change, change))
    if math.isfinite(found):
        return found
    for part in (new,) if old is None else (new, old):
        change = change.masked_fill(~torch.isfinite(part), 0.0)
    return float(torch.dot(change, change))


def far_outside(norms: Mapping[str, float], size: float) -> dict[str, float]:
    """Return the clients whose updates are far outside of the others', and the limit they exceed.

    Args:
        norms: of the round's updates, by client.
        size: norm of what was sent.
    """
    if len(norms) < FEWEST:
        return {}
    middle = median_low(norms.values())
    spread = median_low(abs(norm - middle) for norm in norms.values())
    limit = max(FACTOR * (middle + spread), LEAST * size)
    return {client: limit for client, norm in norms.items() if norm > limit}


class Outliers:
    """The norms of a round's updates, and who was named for theirs.

    Args:
        number: of the round, for the log; None if it is not known.
    """

    def __init__(self, number: int | None = None) -> None:
        self._number = number
        self._norms: dict[str, float] = {}
        self._size = 0.0
        self._named: set[str] = set()

    def add(self, client: str, norm: float, size: float) -> None:
        """Add a client's update.

        Args:
            client: its name.
            norm: of the update.
            size: norm of what was sent.
        """
        self._norms[client] = norm
        self._size = max(self._size, size)

    def discard(self, client: str) -> None:
        """Take a client out."""
        self._norms.pop(client, None)

    def reasons(self) -> dict[str, str]:
        """Return, by client, a sentence about each one that is far outside, once for each."""
        found = far_outside(self._norms, self._size)
        others = {c: n for c, n in self._norms.items() if c not in found}
        usual = median_low(others.values()) if others else 0.0
        new = {c: limit for c, limit in found.items() if c not in self._named}
        self._named |= new.keys()
        return {
            client: f"its update has the norm {self._norms[client]:.3g}, far outside of the "
            f"others': their median is {usual:.3g}, the limit {limit:.3g}"
            for client, limit in new.items()
        }
