"""Infinities of a model, such as a mask of ``-inf``, in what strategies compute."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedpara_plugins.models import restore_infinities
from fedpara_plugins_flower.messages.records import to_record, to_tensors
from fedpara_plugins_flower.run import Start
from fedpara_plugins_flower.seams import replaced_methods

__all__ = ["keep_infinities"]


@contextlib.contextmanager
def keep_infinities(start: Start) -> Iterator[Callable[[Result], Result]]:
    """Give a model its infinities back after each aggregation; a `StartHook`.

    The difference of two equal infinities is NaN, so that momentum and adaptive rules lose them.
    """
    initial = to_tensors(start["initial_arrays"])
    first = {name: value for name, value in initial.items() if _holds_infinity(value)}
    strategy = start["self"]
    if not first:
        yield lambda result: result
        return
    methods = {"aggregate_train": _restoring(strategy.aggregate_train, first)}
    with replaced_methods(strategy, methods):
        yield lambda result: result


def _holds_infinity(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.double().isinf().any())


def _restoring(method: Callable[..., Any], first: dict[str, Tensor]) -> Callable[..., Any]:
    def aggregate(*args: Any, **kwargs: Any) -> Any:
        arrays, metrics = method(*args, **kwargs)
        return restored(arrays, first), metrics

    return aggregate


def restored(arrays: ArrayRecord | None, first: dict[str, Tensor]) -> ArrayRecord | None:
    """Return arrays with the infinities that they began with where they hold NaN."""
    if arrays is None:
        return None
    tensors = to_tensors(arrays)
    found = restore_infinities(tensors, first, only_nan=True)
    changed = {n: v for n, v in found.items() if v is not tensors[n]}
    for name, array in to_record(changed).items():
        arrays[name] = array
    return arrays
