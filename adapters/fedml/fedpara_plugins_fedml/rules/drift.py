"""What SCAFFOLD and FedDyn have in common on the server: sums of what clients keep, and the guard.

The arithmetic is the core's (`fedpara_plugins.optimizers`).
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import (
    ClientReply,
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
from fedpara_plugins_fedml.rules.base import Answer, Mean, Rule

__all__ = ["CHANGE", "DriftRule", "Usable"]

log = logging.getLogger("fedpara.fedml")

CHANGE = "change"
"""The record of a client's change of its variate."""


@dataclass(frozen=True)
class Usable:
    """An answer that counts.

    Attributes:
        answer: of the client.
        reply: the same for the core's arithmetic.
        change: of its variate; {} where the server derives it.
    """

    answer: Answer
    reply: ClientReply
    change: State


class DriftRule(Rule):
    """Clients keep a variate or dual, and correct their steps by it.

    Args:
        weighting: ``uniform``, as published, or ``examples``.
        guard: bounds updates and collects at first; None for the published algorithm.
        clients: how many there are in all.
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
    def next_x(self, x: State, usable: Sequence[Usable]) -> State:
        """The next state; takes the changes into `sums`."""

    # The engine's interface

    def begin(self, server_round: int, x: State, clients: Sequence[str]) -> None:
        """Decide whether variates act in this round, and how far an update may go."""
        self._round = server_round
        self._correct, self._bound = self._guarded.begin(clients=self.clients, a_round=len(clients))

    def task(self, client: str) -> Mapping[str, Any]:
        """Which of its states counts, whether it acts, and the bound."""
        return {
            "accepted": self.sums.rounds.get(client, 0),
            "correct": self._correct,
            "bound": self._bound or 0.0,
        }

    def step(self, x: State, answers: Sequence[Answer], mean: Mean) -> State:
        """The next state, from the answers that can be used.

        Raises:
            ConfigError: no client has the algorithm's half.
        """
        if not any(_reports(answer) for answer in answers):
            raise ConfigError(
                f"the clients answer without their half of {self.name}; set federated_optimizer: "
                f"{self.name} in the YAML of all sides"
            )
        usable = [found for answer in answers if (found := self._usable(answer)) is not None]
        if not usable:
            log.warning("fedpara: %s: no answer counts: the model stays as it was", self.name)
            return x
        new = self.next_x(x, usable)
        self._note(x, usable)
        return new

    def state_dict(self) -> dict[str, Any]:
        """The sums, the norms of the guard, how often it has collected."""
        sums = self.sums
        return {
            "total": sums.total,
            "rounds": sums.rounds,
            "weights": sums.weights,
            "clients": {str(node): client for node, client in sums.clients.items()},
            **self._guarded.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`, on a rule of the same options."""
        for name in ("total", "rounds", "weights"):
            getattr(self.sums, name).clear()
            getattr(self.sums, name).update(state[name])
        self.sums.clients = {int(node): name for node, name in state["clients"].items()}
        self._guarded.load_state_dict(state)

    # For the algorithms

    def take(self, found: Usable, change: State) -> None:
        """Take a client's change into the sums, and say what was out of the ordinary."""
        client = found.answer.client
        nodes = {name: node for node, name in self.sums.clients.items()}
        since = int(found.answer.report["since"])
        verdict = self.sums.take(
            change,
            node=nodes.get(client, len(nodes)),
            client=client,
            since=since,
            server_round=self._round,
            weight=found.answer.examples if self.weighting == "examples" else 1.0,
        )
        log_outcome(log, self.name, verdict, f"client {client}", since)

    # Parts

    def _usable(self, answer: Answer) -> Usable | None:
        change = dict(answer.records.get(CHANGE, {}))
        why = self._why_not(answer, change)
        if why is not None:
            log.warning("fedpara: %s: left out client %s: %s", self.name, answer.client, why)
            return None
        return Usable(answer, ClientReply(answer.state, self.trained, answer.examples), change)

    def _why_not(self, answer: Answer, change: State) -> str | None:
        if not _reports(answer):
            return (
                f"it answers without its half of {self.name}; set federated_optimizer: "
                f"{self.name} in its YAML"
            )
        if answer.report["kept"] == 0:
            return "its training gave NaN or infinity"
        if not finite([*answer.state.values(), *change.values()]):
            return "it holds NaN or infinity"
        if self.needs_change and change.keys() != self.trained:
            return "its variate's names are not those of its trained parameters"
        if any(value.shape != answer.state[name].shape for name, value in change.items()):
            return "its variate's shapes are not those of its trained parameters"
        return None

    def _note(self, x: State, usable: Sequence[Usable]) -> None:
        """Tell the guard what came of the round."""
        before = {name: x[name] for name in self.trained}
        answers = {f"client {u.answer.client}": u.answer for u in usable}
        self._guarded.note(
            {who: norm(subtract(a.state, before).values()) for who, a in answers.items()},
            {who: a.report["kept"] for who, a in answers.items()},
        )


def _reports(answer: Answer) -> bool:
    """Whether an answer tells what the client's half tells."""
    values = [answer.report.get(key) for key in ("since", "kept")]
    return all(isinstance(v, int | float) and math.isfinite(v) for v in values)
