"""The common part of SCAFFOLD and FedDyn on the server: sums of variates or duals, and the guard.

The arithmetic is the core's (`fedpara_plugins.optimizers`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import (
    ClientUpdate,
    Contributions,
    Guard,
    GuardedRounds,
    State,
    Weighting,
    finite,
    log_outcome,
    norm,
    subtract,
)
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.rules.base import ClientReply, Mean, Rule

__all__ = ["CHANGE", "DriftRule", "UsableReply"]

CHANGE = "change"
"""The record of a client's change of its variate."""


@dataclass(frozen=True)
class UsableReply:
    """A client's reply that has passed all checks.

    Attributes:
        client_reply: as the engine gives it.
        reply: the same for the core's arithmetic.
        change: of its variate; {} where the server computes it.
    """

    client_reply: ClientReply
    reply: ClientUpdate
    change: State


class DriftRule(Rule):
    """Clients keep a variate or dual, and correct their steps by it.

    Args:
        weighting: ``uniform``, as published, or ``examples``.
        guard: bounds updates and collects at first; None for the published algorithm.
        clients: number of all clients.
    """

    needs_change = False

    def __init__(self, *, weighting: Weighting, guard: Guard | None, clients: int) -> None:
        self.weighting = weighting
        self.guard = guard
        self.clients = clients
        self.sums = Contributions()
        self._guarded = GuardedRounds(guard, self.name, log)
        self._round = 0
        self._correct = True
        self._bound: float | None = None

    @abstractmethod
    def next_x(self, x: State, usable: Sequence[UsableReply]) -> State:
        """Return the next state, and add the changes to `sums`."""

    # The engine's interface

    def begin(self, server_round: int, x: State, clients: Sequence[str]) -> None:
        """Decide whether variates correct steps in this round, and the bound of updates."""
        self._round = server_round
        self._correct, self._bound = self._guarded.begin(clients=self.clients, a_round=len(clients))

    def task(self, client: str) -> Mapping[str, Any]:
        """Return which of the client's states counts, whether it corrects steps, and the bound."""
        return {
            "accepted": self.sums.rounds.get(client, 0),
            "correct": self._correct,
            "bound": self._bound or 0.0,
        }

    def step(self, x: State, replies: Sequence[ClientReply], mean: Mean) -> State:
        """Return the next state, from the replies that can be used.

        Raises:
            ConfigError: if no client runs the algorithm.
        """
        if not any(_has_report(reply) for reply in replies):
            raise ConfigError(
                f"the clients' replies lack the report of {self.name}; set federated_optimizer: "
                f"{self.name} in the YAML of all sides"
            )
        usable = [each for reply in replies if (each := self._usable(reply)) is not None]
        if not usable:
            log.warning("fedpara: %s: no reply is usable: the model is unchanged", self.name)
            return x
        new = self.next_x(x, usable)
        self._inform_guard(x, usable)
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return the sums, and the guard's norms and number of collecting rounds."""
        sums = self.sums
        return {
            "total": sums.total,
            "rounds": sums.rounds,
            "weights": sums.weights,
            "clients": {str(node): client for node, client in sums.clients.items()},
            **self._guarded.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a rule with the same options."""
        for name in ("total", "rounds", "weights"):
            getattr(self.sums, name).clear()
            getattr(self.sums, name).update(state[name])
        self.sums.clients = {int(node): name for node, name in state["clients"].items()}
        self._guarded.load_state_dict(state)

    # For the algorithms

    def add_change(self, usable: UsableReply, change: State) -> None:
        """Add a client's change to the sums, and log anything out of the ordinary."""
        client = usable.client_reply.client
        nodes = {name: node for node, name in self.sums.clients.items()}
        since = int(usable.client_reply.report["since"])
        verdict = self.sums.take(
            change,
            node=nodes.get(client, len(nodes)),
            client=client,
            since=since,
            server_round=self._round,
            weight=usable.client_reply.examples if self.weighting == "examples" else 1.0,
        )
        log_outcome(log, self.name, verdict, f"client {client}", since)

    # Parts

    def _usable(self, reply: ClientReply) -> UsableReply | None:
        change = dict(reply.records.get(CHANGE, {}))
        why = self._why_not(reply, change)
        if why is not None:
            log.warning("fedpara: %s: left out client %s: %s", self.name, reply.client, why)
            return None
        return UsableReply(reply, ClientUpdate(reply.state, self.trained, reply.examples), change)

    def _why_not(self, reply: ClientReply, change: State) -> str | None:
        if not _has_report(reply):
            return (
                f"its reply lacks the report of {self.name}; set federated_optimizer: {self.name} "
                f"in its YAML"
            )
        if reply.report["kept"] == 0:
            return "its training gave NaN or infinity"
        if not finite(change.values()):  # the model has passed the gate
            return "the change of its variate holds NaN or infinity"
        if self.needs_change and change.keys() != self.trained:
            return "its variate's names are not those of its trained parameters"
        if any(value.shape != reply.state[name].shape for name, value in change.items()):
            return "its variate's shapes are not those of its trained parameters"
        return None

    def _inform_guard(self, x: State, usable: Sequence[UsableReply]) -> None:
        """Give the guard the norms of the round's updates and the fractions that clients kept."""
        before = {name: x[name] for name in self.trained}
        replies = {f"client {each.client_reply.client}": each.client_reply for each in usable}
        self._guarded.note(
            {who: norm(subtract(u.state, before).values()) for who, u in replies.items()},
            {who: u.report["kept"] for who, u in replies.items()},
        )


def _has_report(reply: ClientReply) -> bool:
    """Return whether a reply has the sound report of a client that runs the algorithm."""
    since, kept = (reply.report.get(key) for key in ("since", "kept"))
    numbers = all(isinstance(v, int | float) and math.isfinite(v) for v in (since, kept))
    return numbers and since >= 0 and 0 <= kept <= 1  # type: ignore[operator]
