"""Infinities of a model, such as a mask of ``-inf``, in what strategies compute.

The difference of two equal infinities is NaN. Rules that work value by value lose the mask alone,
which it gets back after each aggregation. A norm over all tensors would be NaN: strategies that
take one (Krum, QFedAvg, clipping for differential privacy) get zeros in the places of infinities.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedpara_plugins.models import restore_infinities
from fedpara_plugins_flower.messages.records import to_record, to_tensors
from fedpara_plugins_flower.run import Start
from fedpara_plugins_flower.seams import (
    Parameters,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
    replaced_methods,
)
from fedpara_plugins_flower.server.strategy_arrays import takes_norms

__all__ = ["keep_infinities", "keep_infinities_of_legacy"]

Method = Callable[..., Any]

MARK = "_fedpara_restoring"


@contextlib.contextmanager
def keep_infinities(start: Start) -> Iterator[Callable[[Result], Result]]:
    """Keep a model's infinities, whatever a strategy computes; a `StartHook`."""
    strategy = start["self"]
    own = _OwnInfinities(start["initial_arrays"])
    methods: dict[str, Method] = {}
    if own.held and takes_norms(strategy):
        methods["configure_train"] = own.hidden(strategy.configure_train)
    if own.held:
        methods["aggregate_train"] = own.restoring(strategy.aggregate_train)
    with replaced_methods(strategy, methods):
        yield lambda result: result


def keep_infinities_of_legacy(components: Any) -> None:
    """Keep the infinities of a legacy app's model where its strategy computes NaN.

    Args:
        components: what the app's ``server_fn`` returns.
    """
    server = getattr(components, "server", None)
    for strategy in (getattr(components, "strategy", None), getattr(server, "strategy", None)):
        aggregate = getattr(strategy, "aggregate_fit", None)
        if callable(aggregate) and not hasattr(aggregate, MARK):
            strategy.aggregate_fit = _restoring_lists(aggregate)  # type: ignore[union-attr]


def _restoring_lists(aggregate: Method) -> Method:
    @wraps(aggregate)
    def aggregated(number: int, results: Any, *args: Any, **kwargs: Any) -> Any:
        parameters, metrics = aggregate(number, results, *args, **kwargs)
        if parameters is None or not results:
            return parameters, metrics
        # The gate has compared each answer with what was sent: all hold the same infinities.
        answer, found = map(_numbered, (results[0][1].parameters, parameters))
        kept = restore_infinities(found, answer, only_nan=True)
        if all(kept[n] is value for n, value in found.items()):
            return parameters, metrics
        return ndarrays_to_parameters([value.numpy() for value in kept.values()]), metrics

    setattr(aggregated, MARK, True)
    return aggregated


def _numbered(parameters: Parameters) -> dict[str, Tensor]:
    arrays = parameters_to_ndarrays(parameters)
    return {str(n): torch.from_numpy(np.asarray(array)) for n, array in enumerate(arrays)}


class _OwnInfinities:
    """The tensors with infinities of the model that is trained.

    Args:
        arrays: the model's first state.

    Attributes:
        held: those tensors, by name.
    """

    def __init__(self, arrays: ArrayRecord) -> None:
        self.held = _with_infinities(arrays)
        self._hides = False

    def hidden(self, configure: Method) -> Method:
        """Return a ``configure_train`` whose strategy sees zeros, and whose clients do not."""

        def configured(number: int, arrays: ArrayRecord, *args: Any, **kwargs: Any) -> Any:
            self.held, self._hides = _with_infinities(arrays), True
            messages = list(configure(number, _changed(arrays, self._zeros), *args, **kwargs))
            done: dict[int, tuple[ArrayRecord, ArrayRecord]] = {}  # one record for many nodes
            for message in messages:
                for name, record in message.content.array_records.items():
                    if id(record) not in done:
                        done[id(record)] = record, _changed(record, self._given_back)
                    message.content[name] = done[id(record)][1]
            return messages

        return configured

    def restoring(self, aggregate: Method) -> Method:
        """Return an ``aggregate_train`` whose result holds the infinities."""

        def aggregated(number: int, replies: Iterable[Message], *args: Any, **kwargs: Any) -> Any:
            replies = list(replies)
            for reply in replies if self._hides else ():
                if not reply.has_error():
                    for name, record in reply.content.array_records.items():
                        reply.content[name] = _changed(record, self._zeros)
            arrays, metrics = aggregate(number, replies, *args, **kwargs)
            return arrays and _changed(arrays, self._given_back), metrics

        return aggregated

    def _zeros(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: value.masked_fill(self.held[name].isinf(), 0.0)
            if name in self.held and self.held[name].shape == value.shape
            else value
            for name, value in tensors.items()
        }

    def _given_back(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return restore_infinities(tensors, self.held, only_nan=not self._hides)


def _with_infinities(arrays: ArrayRecord) -> dict[str, Tensor]:
    return {
        name: value
        for name, value in to_tensors(arrays).items()
        if value.is_floating_point() and bool(torch.isinf(value.double()).any())
    }


def _changed(
    arrays: ArrayRecord, change: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
) -> ArrayRecord:
    """Return a record with some of its tensors changed; the same arrays for all others."""
    before = to_tensors(arrays)
    after = change(before)
    changed = to_record({n: v for n, v in after.items() if v is not before[n]})
    return ArrayRecord({name: changed.get(name, array) for name, array in arrays.items()})
