"""The user's ServerAggregator between replies and rule, as in FedML's cross-silo mode."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedpara_plugins import MismatchError, ModelSpec
from fedpara_plugins.exchange import cast
from fedpara_plugins.models import restore_infinities
from fedpara_plugins_fedml.engine.models import plain_state, to_state
from fedpara_plugins_fedml.rules import ClientReply, Rule, State
from fedpara_plugins_fedml.seams import averaging, note_client_models

__all__ = ["Aggregation"]

log = logging.getLogger("fedpara.fedml")

Weighed = list[tuple[float, OrderedDict[str, Tensor]]]


class Aggregation:
    """Calls ``on_before_aggregation``, ``aggregate`` and ``on_after_aggregation`` of an aggregator.

    All of them see plain named tensors, of memory that is theirs.

    Args:
        aggregator: the user's, or FedML's default.
        args: FedML's.
        spec: of the model that is exchanged.
    """

    def __init__(self, aggregator: Any, args: Any, spec: ModelSpec) -> None:
        self._aggregator = aggregator
        self._args = args
        self._spec = spec

    def next_state(self, x: State, replies: Sequence[ClientReply], rule: Rule) -> State:
        """Return the server's next state; x itself if it came to NaN or infinity.

        Args:
            x: the state that the clients started from.
            replies: of the round, at least one.
            rule: of the optimizer.

        Raises:
            MismatchError: a hook has changed names or shapes.
        """
        with averaging(self._args):
            usable = self._before(replies)
            if not usable:
                log.error("fedpara: on_before_aggregation left nobody: the model stays as it was")
                return x
            new = rule.step(x, usable, lambda some: self._mean(x, some))
            after = self._aggregator.on_after_aggregation(self._placed(new))
        return self._sound(x, after)

    def _before(self, replies: Sequence[ClientReply]) -> list[ClientReply]:
        """Return what the hook makes of the replies; defences change, leave out, or pick some."""
        raw = self._weighed(replies)
        found, kept = self._aggregator.on_before_aggregation(list(raw))
        if getattr(self._args, "enable_contribution", False):  # for assess_contribution
            models = [(examples, plain_state(to_state(state))) for examples, state in found]
            note_client_models(models)
        places = _places(raw, found, kept)
        return [
            replace(
                # Of nobody in particular: what belongs to one client counts for none.
                ClientReply("", 0, {}) if place is None else replies[place],
                examples=float(examples),
                state=to_state(state),
            )
            for place, (examples, state) in zip(places, found, strict=True)
        ]

    def _mean(self, x: State, replies: Sequence[ClientReply]) -> State:
        return self._named(x, self._aggregator.aggregate(self._weighed(replies)))

    def _weighed(self, replies: Sequence[ClientReply]) -> Weighed:
        return [(reply.examples, self._placed(reply.state)) for reply in replies]

    def _placed(self, state: State) -> OrderedDict[str, Tensor]:
        """Copy to where the aggregator's model is, which tests move and hooks compare with."""
        parameter = next(iter(self._aggregator.model.parameters()), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        return OrderedDict((name, value.to(device)) for name, value in plain_state(state).items())

    def _named(self, x: State, found: Mapping[str, Any]) -> State:
        """Return a state in the order and the dtypes of x: integers are averaged as floats."""
        if unlike := sorted(x.keys() ^ found.keys()):
            raise MismatchError(
                f"the aggregator returned other names than it was given: {unlike[:5]} "
                f"({len(unlike)} differ)"
            )
        return {k: cast(found[k].detach().cpu(), value.dtype) for k, value in x.items()}

    def _sound(self, x: State, found: Mapping[str, Any]) -> State:
        # Differences of a mask's infinities are NaN for most rules.
        new = restore_infinities(self._named(x, found), x, only_nan=True)
        for name, value in new.items():
            if value.shape != x[name].shape:
                raise MismatchError(
                    f"the aggregator returned {name!r} of shape {tuple(value.shape)}, expected "
                    f"{tuple(x[name].shape)}"
                )
            if bool((~torch.isfinite(value) & torch.isfinite(x[name])).any()):
                log.error(
                    "fedpara: this round's aggregate holds NaN or infinity in %r: the model stays "
                    "as it was", name,
                )  # fmt: skip
                return x
        # Noise of central differential privacy, say, falls on private places too.
        return {k: x[k] if k in self._spec.private_keys else v for k, v in new.items()}


def _places(raw: Weighed, found: Weighed, kept: Any) -> list[int | None]:
    """Return whose replies the hook returned: FedML's own hooks say so only in part."""
    objects = {id(state): place for place, (_, state) in enumerate(raw)}
    if all(id(state) in objects for _, state in found):
        return [objects[id(state)] for _, state in found]
    if len(found) == len(raw):
        return list(range(len(raw)))
    if kept is not None and len(kept) == len(found):
        return [int(place) for place in kept]
    return [None] * len(found)
