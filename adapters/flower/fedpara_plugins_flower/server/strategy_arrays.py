"""A model's integers and scalars in a form that Flower's strategies can compute with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from flwr.serverapp.strategy import Result
from torch import Tensor

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.run import Run, Start, StartHook
from fedpara_plugins_flower.seams import SCALAR_ERROR

__all__ = [
    "averageable",
    "record_strategy",
    "takes_norms",
    "warn_about_integers",
    "with_remedy",
]

EXACT = 2**53
"""Bound up to which all integers are float64 values."""

NORMS = ("QFedAvg", "MultiKrum", "Bulyan", "DifferentialPrivacy")
"""Prefixes of the names of Flower's classes whose rule takes a norm over all tensors."""


def averageable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same values with integers and booleans as float64, as every average has them.

    QFedAvg and the clipping strategies multiply a client's arrays in place, which NumPy refuses for
    integers. The server's next message has their first dtypes again. Integers beyond 2^53 stay
    integers.
    """
    return {
        name: value.double() if _convertible(value) else value for name, value in tensors.items()
    }


def record_strategy(run: Run) -> StartHook:
    """Return a hook that sets ``run.strategy`` to the strategy that is started."""

    @contextlib.contextmanager
    def hook(start: Start) -> Iterator[Callable[[Result], Result]]:
        run.strategy = start["self"]
        yield lambda result: result

    return hook


def warn_about_integers(tensors: Mapping[str, Tensor], strategy: object | None) -> None:
    """Warn if there are integers among the clients' tensors and the strategy takes norms.

    Args:
        tensors: of the first reply.
        strategy: Flower's, possibly a wrapper; None if it is not known.
    """
    names = [name for name, value in tensors.items() if _integer(value)]
    if names and (strategy is None or takes_norms(strategy)):
        log.warning(
            "fedpara: %d integer tensors (%s%s) are passed to the strategy like weights. A "
            "rule that takes a norm over all tensors (QFedAvg, Krum, Bulyan, clipping) counts "
            'them: keep them on the clients there, with the option private = "*%s"',
            len(names),
            names[0],
            ", ..." if len(names) > 1 else "",
            names[0].rpartition(".")[2],
        )


def takes_norms(strategy: object) -> bool:
    """Return whether a strategy of Flower takes norms over all tensors of a client's reply."""
    return any(
        base.__name__.startswith(NORMS) and "ClientSide" not in base.__name__
        for base in type(strategy).__mro__
    )


def with_remedy(error: Exception) -> Exception:
    """Return an error that names the remedy, if there is one for a ServerApp's error; else itself.

    Args:
        error: that the ServerApp raised.
    """
    if SCALAR_ERROR not in str(error):
        return error
    return ConfigError(
        f"fedpara: this strategy of this version of Flower cannot handle arrays without dimensions "
        f"(BatchNorm's num_batches_tracked, for example; {error}). Upgrade to flwr>=1.28, use "
        f"GroupNorm, or use FedAvg, FedProx, QFedAvg, Krum or MultiKrum, which can"
    )


def _convertible(value: Tensor) -> bool:
    if not _integer(value):
        return False
    numbers = value.cpu().numpy()  # torch has no maximum for its larger unsigned integers
    return not numbers.size or max(abs(int(numbers.max())), abs(int(numbers.min()))) <= EXACT


def _integer(value: Tensor) -> bool:
    return not value.is_floating_point() and not value.is_complex()
