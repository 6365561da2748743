"""The sum of what all clients keep, on a server that keeps none of it, and who is in that sum.

SCAFFOLD's c is the mean of the clients' variates, FedDyn's h the mean of their duals. The server
only ever hears of changes, so a change that is lost on either side would make the two disagree for
good. Each side therefore names the round that its knowledge of a client is of:

- a client's reply says of which round the state is that it started from (`since`), 0 for zeros;
- the server's message says of which round it has the client's state (`accepted`).

A reply that never arrived is thereby undone on the client, and a client that lost its state is
noticed on the server, which takes its old share out of the sum.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedpara_plugins.optimizers.named import State, copied

__all__ = ["Contributions", "Kept", "Verdict"]

log = logging.getLogger(__name__)

Verdict = Literal["taken", "new", "lost", "stale"]
"""What became of a change: taken in; of a client that is new; of one that had lost its state; or
not taken in, since it starts from a state that is not the one the server has of that client."""


@dataclass
class Kept:
    """What one client keeps between its rounds.

    Attributes:
        known: its tensors as of the last round that the server confirmed; None for zeros.
        known_round: that round, 0 for none.
        last: its tensors after its last round, while the server has not confirmed that one.
        last_round: that round, 0 for none.
    """

    known: State | None = None
    known_round: int = 0
    last: State | None = None
    last_round: int = 0

    def begin(self, accepted: int | None) -> str | None:
        """Settle which tensors count, before a round.

        Args:
            accepted: of which round the server has this client's tensors; None if it does not know
                the client (yet), which leaves the decision here.

        Returns:
            What had to be undone, for the log; None if nothing.
        """
        undone = None
        if accepted is None or (self.last_round and accepted == self.last_round):
            if self.last_round:
                self.known, self.known_round = self.last, self.last_round
        elif accepted == self.known_round:
            if self.last_round:
                undone = f"the server never had the reply of round {self.last_round}; undone here"
        else:
            undone = (
                f"the server has this client's state of round {accepted}, here is that of "
                f"{self.last_round or self.known_round}; both start from zero"
            )
            self.known, self.known_round = None, 0
        self.last, self.last_round = None, 0
        return undone

    def end(self, tensors: State, server_round: int) -> None:
        """Keep the tensors of a round that is over, until the server confirms them or not."""
        self.last, self.last_round = tensors, server_round

    def correct(self, lost: Mapping[str, Tensor], factor: float) -> None:
        """Take into the last round's tensors what a codec has lost on the way to the server.

        Else the sum over all clients would drift away from what they keep.

        Args:
            lost: by name, what was given to the codec minus what the server will decode.
            factor: by which it enters.
        """
        for name, value in (self.last or {}).items():
            if name in lost:
                self.last[name] = value + factor * lost[name].to(value.dtype)  # type: ignore[index]


@dataclass
class Contributions:
    """The weighted sum of all clients' tensors.

    Attributes:
        remember: keep every client's tensors too: then a lost client is taken out of the sum
            exactly, else by the mean of all clients in it.
        total: the sum, float64.
        rounds: for each client in the sum, the round of its last change.
        weights: for each of them, its weight, as first told.
        clients: which client a node is.
        kept: each client's tensors, if ``remember``.
    """

    remember: bool = False
    total: State = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    clients: dict[int, str] = field(default_factory=dict)
    kept: dict[str, State] = field(default_factory=dict)

    def accepted(self, node: int) -> int | None:
        """Of which round the state of that node is in the sum; None for a node not met yet."""
        client = self.clients.get(node)
        return None if client is None else self.rounds.get(client, 0)

    def take(
        self,
        change: Mapping[str, Tensor],
        *,
        node: int,
        client: str,
        since: int,
        server_round: int,
        weight: float = 1.0,
        connected: Collection[int] = (),
    ) -> Verdict:
        """Take a client's change into the sum.

        Args:
            change: its tensors after the round minus before it.
            node: where it comes from.
            client: its own name, which may outlive the node's id.
            since: of which round its tensors before were; 0 for zeros.
            server_round: this one.
            weight: of the client; the first one told stays.
            connected: nodes that are there: a name used by two of them is two clients.
        """
        holder = next((n for n, c in self.clients.items() if c == client and n != node), None)
        if holder is not None and holder in connected:
            client = f"{client}@{node}"
        before = self.clients.get(node)
        self.clients = {n: c for n, c in self.clients.items() if c != client} | {node: client}
        lost = False
        if before is not None and before != client and before in self.rounds:
            self._remove(before)
            lost = True
        have = self.rounds.get(client, 0)
        if since != have:
            if since:
                return "stale"
            self._remove(client)
            lost = True
        weight = self.weights.setdefault(client, weight)
        for name, value in change.items():
            wide = value.detach().to("cpu", torch.float64)
            held = self.total.get(name)
            self.total[name] = weight * wide if held is None else held + weight * wide
        if self.remember:
            own = self.kept.get(client)
            self.kept[client] = (
                copied(change) if own is None else {k: v + change[k] for k, v in own.items()}
            )
        self.rounds[client] = server_round
        return "lost" if lost else "taken" if have else "new"

    def mean(self, clients: int) -> State:
        """The mean over all clients, float64; those that never answered count with zeros.

        Args:
            clients: how many there are.
        """
        known = sum(self.weights.values())
        if not self.weights:
            return {}
        unknown = max(clients - len(self.weights), 0)
        whole = known + unknown * known / len(self.weights)
        return {name: value / whole for name, value in self.total.items()}

    def _remove(self, client: str) -> None:
        """Take a client out of the sum: exactly if its tensors are here, else an average share."""
        if self.rounds.pop(client, None) is None:
            return
        share = self.weights[client] / sum(self.weights.values())
        weight = self.weights.pop(client)
        own = self.kept.pop(client, None)
        for name, value in self.total.items():
            gone = weight * own[name].double() if own is not None else share * value
            self.total[name] = value - gone
