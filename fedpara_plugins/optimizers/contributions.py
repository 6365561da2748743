"""The sum of all clients' variates or duals, on a server that need not keep any of them.

SCAFFOLD's c is the mean of the clients' variates, FedDyn's h the mean of their duals. The server
receives changes only, so a change that is lost on either side would make the two sides disagree for
good. Each side therefore names the round of its knowledge of a client:

- a client's reply names the round of the state that it started from (`since`), 0 for zeros;
- the server's message names the round of the client's state in the sum (`accepted`).

This lets a client undo a reply that never arrived. It also lets the server notice that a client
lost its state; the server then takes the client's old share out of the sum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fedpara_plugins.optimizers.named_tensors import State, copied

__all__ = ["ChangeOutcome", "Contributions", "CorrectionState"]

ChangeOutcome = Literal["taken", "new", "lost", "stale"]
"""The outcome of a client's change: ``taken`` into the sum; taken, of a ``new`` client; taken, of a
client that had ``lost`` its state; or not taken, since it starts from a ``stale`` state, not from
the one in the sum."""


@dataclass
class CorrectionState:
    """One client's variate or dual between its rounds.

    Attributes:
        confirmed: its tensors as of the last round that the server confirmed; None for zeros.
        confirmed_round: that round, 0 for none.
        pending: its tensors after its last round, while the server has not confirmed them.
        pending_round: that round, 0 for none.
    """

    confirmed: State | None = None
    confirmed_round: int = 0
    pending: State | None = None
    pending_round: int = 0

    def begin(self, accepted: int | None) -> str | None:
        """Decide before a round which tensors count.

        Args:
            accepted: the round of this client's tensors in the server's sum; None if the server
                does not know the client yet, so that the client's own tensors count.

        Returns:
            What had to be undone, for the log; None if nothing.
        """
        undone = None
        if accepted is None or (self.pending_round and accepted == self.pending_round):
            if self.pending_round:
                self.confirmed, self.confirmed_round = self.pending, self.pending_round
        elif accepted == self.confirmed_round:
            if self.pending_round:
                undone = (
                    f"the server never had the reply of round {self.pending_round}; undone here"
                )
        else:
            undone = (
                f"the server has this client's state of round {accepted}, the client has that of "
                f"round {self.pending_round or self.confirmed_round}; both start from zero"
            )
            self.confirmed, self.confirmed_round = None, 0
        self.pending, self.pending_round = None, 0
        return undone

    def end(self, tensors: State, server_round: int) -> None:
        """Keep the tensors of a finished round until the server confirms them or not."""
        self.pending, self.pending_round = tensors, server_round

    def correct(self, lost: Mapping[str, Tensor], factor: float) -> None:
        """Add what a codec lost on the way to the server to the last round's tensors.

        Without this correction the server's sum would drift away from the clients' tensors.

        Args:
            lost: by name, the codec's input minus what the server will decode.
            factor: by which the loss is multiplied.
        """
        for name, value in (self.pending or {}).items():
            if name in lost:
                corrected = value + factor * lost[name].to(value.dtype)
                self.pending[name] = corrected  # type: ignore[index]


@dataclass
class Contributions:
    """The weighted sum of all clients' tensors.

    Attributes:
        remember: whether to keep every client's tensors too. A client that lost its state is then
            taken out of the sum exactly; otherwise the mean of all clients in it is taken out.
        total: the sum, float64.
        rounds: for each client in the sum, the round of its last change.
        weights: for each client in the sum, its weight, as first told.
        clients: the client's name of each node.
        kept: each client's tensors, if ``remember``.
    """

    remember: bool = False
    total: State = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    clients: dict[int, str] = field(default_factory=dict)
    kept: dict[str, State] = field(default_factory=dict)

    def accepted(self, node: int) -> int | None:
        """Return the round of a node's state in the sum, 0 for none; None for an unknown node."""
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
    ) -> ChangeOutcome:
        """Take a client's change into the sum.

        Args:
            change: its tensors after the round minus those before it.
            node: the id of its node.
            client: its own name, which may outlive the node's id.
            since: the round of its tensors before this one; 0 for zeros.
            server_round: this round.
            weight: of the client; the first weight told stays.
            connected: the connected nodes; one name used by two of them means two clients.
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
            sofar = self.total.get(name)
            self.total[name] = weight * wide if sofar is None else sofar + weight * wide
        if self.remember:
            own = self.kept.get(client)
            self.kept[client] = (
                copied(change) if own is None else {k: v + change[k] for k, v in own.items()}
            )
        self.rounds[client] = server_round
        return "lost" if lost else "taken" if have else "new"

    def mean(self, clients: int) -> State:
        """Return the mean over all clients, float64; clients that never answered count as zeros.

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
        """Take a client out of the sum: exactly if its tensors are kept, else by a mean share."""
        if self.rounds.pop(client, None) is None:
            return
        share = self.weights[client] / sum(self.weights.values())
        weight = self.weights.pop(client)
        own = self.kept.pop(client, None)
        for name, value in self.total.items():
            gone = weight * own[name].double() if own is not None else share * value
            self.total[name] = value - gone
