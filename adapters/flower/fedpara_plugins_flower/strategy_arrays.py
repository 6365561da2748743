"""What is done so that Flower's strategies can compute with a model's integers and scalars."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor

from fedpara_plugins import ConfigError

__all__ = ["averageable", "explained", "tell_integers"]

log = logging.getLogger("flwr.fedpara")

EXACT = 2**53
"""Integers up to here are float64 values."""

SCALAR_ERROR = "Invalid arguments for Array"


def averageable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values with integers and booleans as float64, as every average of them is anyway.

    QFedAvg and the clipping strategies multiply a client's arrays in place, which NumPy refuses for
    integers. What the server sends next is cast back to its first dtype. Integers beyond 2^53 are
    left as they are.
    """
    return {
        name: value.double() if _convertible(value) else value for name, value in tensors.items()
    }


def tell_integers(tensors: Mapping[str, Tensor]) -> None:
    """Say once, at the first message, which integers a strategy will count among the weights."""
    names = [name for name, value in tensors.items() if _integer(value)]
    if names:
        log.warning(
            "fedpara: %d integer tensors (%s%s) go to the strategy as numbers like the weights. A "
            "rule that takes a norm over all tensors (QFedAvg, Krum, Bulyan, clipping) counts "
            'them: keep them on the clients there, with the option private = "*%s"',
            len(names),
            names[0],
            ", ..." if len(names) > 1 else "",
            names[0].rpartition(".")[2],
        )


def explained(error: Exception) -> Exception:
    """The error that a ServerApp ended with, or one that says what to do about it."""
    if SCALAR_ERROR not in str(error):
        return error
    return ConfigError(
        f"fedpara: this strategy of this version of Flower cannot handle arrays without dimensions "
        f"(BatchNorm's num_batches_tracked, for one; {error}). Upgrade to flwr>=1.28, use "
        f"GroupNorm, or take FedAvg, FedProx, QFedAvg, Krum or MultiKrum, which can"
    )


def _convertible(value: Tensor) -> bool:
    if not _integer(value):
        return False
    numbers = value.cpu().numpy()  # torch has no maximum of its larger unsigned integers
    return not numbers.size or max(abs(int(numbers.max())), abs(int(numbers.min()))) <= EXACT


def _integer(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex()
