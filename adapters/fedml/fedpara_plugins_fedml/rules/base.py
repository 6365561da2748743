"""The interface of a federated optimizer: one class on the server, and one in each client.

The engine does all that optimizers have in common: coding, private state, accounting, exclusion of
clients. A rule defines which tensors and values are sent besides the model, what happens around a
client's training, and how the server's next state is computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins import MismatchError

__all__ = ["ClientReply", "LocalRule", "Mean", "ReplyExtras", "RoundContext", "Rule", "State"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class ClientReply:
    """A client's reply as the rule uses it: decoded, finite and of the right shapes.

    Attributes:
        client: its name.
        examples: its number of training examples.
        state: the client's model by all names of the server's state; the private values are the
            server's own, the same in every reply.
        records: the tensors that the client's rule has sent besides the model.
        report: the values that the client's rule has sent.
        received: the shared model as this client received it, if a lossy codec has changed it; else
            None.
    """

    client: str
    examples: float
    state: State
    records: Mapping[str, State] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    received: State | None = None


Mean = Callable[[Sequence[ClientReply]], State]
"""The user's ``ServerAggregator.aggregate``: the models' mean, weighted by examples."""


class Rule(ABC):
    """An optimizer's class on the server.

    Attributes:
        name: of the optimizer, as FedML's key ``federated_optimizer`` has it.
        prepares: whether clients compute something at the server's state before any of them trains
            (Mime's gradients). Only the single process offers that.
        trained: names of the parameters that are trained and shared, to which the rule applies; the
            engine sets it before the first round. All other names of the state are averaged.
        differs: how FedML's own single process computes otherwise, for the log; "" if it does not.
    """

    name: str = ""
    prepares: bool = False
    trained: frozenset[str] = frozenset()
    differs: str = ""

    def begin(self, server_round: int, x: State, clients: Sequence[str]) -> None:  # noqa: B027
        """Begin a round.

        Args:
            server_round: the first is 1.
            x: the server's state, which must not be changed.
            clients: names of the round's clients.
        """

    def prepared(self, replies: Sequence[ClientReply]) -> None:  # noqa: B027
        """Use the clients' results at x; called only where `prepares` is set.

        Args:
            replies: of the round's clients; their ``state`` is x itself.
        """

    def records(self) -> Mapping[str, State]:
        """Return the tensors that are sent to clients besides the model, by record.

        Records without tensors are left out.
        """
        return {}

    def task(self, client: str) -> Mapping[str, Any]:
        """Return JSON values for one client."""
        return {}

    @abstractmethod
    def step(self, x: State, replies: Sequence[ClientReply], mean: Mean) -> State:
        """Return the server's next state, with the same names.

        Args:
            x: the state that the clients started from.
            replies: of the round, at least one.
            mean: see `Mean`.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a restarted server needs: plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore a state that `state_dict` returned."""


@dataclass(frozen=True)
class RoundContext:
    """One round on a client, as its rule sees it.

    Attributes:
        client: its name.
        server_round: the first is 1.
        task: the values from the server's rule.
        records: the tensors from the server's rule.
        storage: bytes by key that this client keeps between rounds; changes are written when its
            reply is complete, and not before.
        train_data: the client's training data.
        device: to train on.
        args: FedML's.
        trainer: the user's ClientTrainer, or the default.
        exchanged: names of the model's state that are sent; None for all.
    """

    client: str
    server_round: int
    task: Mapping[str, Any]
    records: Mapping[str, State]
    storage: MutableMapping[str, bytes]
    train_data: Any
    device: torch.device
    args: Any
    trainer: Any = None
    exchanged: frozenset[str] | None = None


@dataclass
class ReplyExtras:
    """The rule's additions to a client's reply, complete at the end of the rule's context.

    Attributes:
        records: tensors besides the model, by name.
        report: JSON values.
        on_encoded: called when the reply is encoded and before anything is kept, with the codec's
            error for each record: the tensors given minus those that the server decodes. The
            model's record is called ``model``.
    """

    records: dict[str, State] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    on_encoded: Callable[[Mapping[str, State]], None] | None = None


class LocalRule:
    """An optimizer's class in a client; this one adds nothing to the training.

    Attributes:
        updates: names of `ReplyExtras.records` that are updates already, such as a variate's
            change: the codec encodes no difference of them, and feeds no error back.
        parts: states of the model's size in a message to this client; what is larger is refused.
    """

    updates: frozenset[str] = frozenset()
    parts: int = 2

    def trainer(self, model: nn.Module, args: Any) -> Any | None:
        """Return the rule's ClientTrainer if the user gives none; None for FedML's default."""
        return None

    def prepare(self, model: nn.Module, local_round: RoundContext) -> ReplyExtras:
        """Return the results that the server needs before training; see `Rule.prepares`.

        Raises:
            MismatchError: if this rule has none, because the server runs another rule.
        """
        name = getattr(local_round.args, "federated_optimizer", "FedAvg")
        raise MismatchError(
            f"the server asks for a step before training, as Mime does, and this client runs "
            f"{name}; set the same federated_optimizer in the YAML of all sides"
        )

    @contextmanager
    def around(self, model: nn.Module, local_round: RoundContext) -> Iterator[ReplyExtras]:
        """Return a context around the training.

        It is entered when the model has been loaded (shared as received, private of this client),
        and left when the trainer's ``train`` has returned.
        """
        yield ReplyExtras()
