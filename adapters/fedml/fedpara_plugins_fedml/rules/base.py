"""What one federated optimizer is: a half on the server and a half in each client.

The engine (`server`, `client`) does all that optimizers have in common: coding, private state,
accounting, who is excluded. A rule only says what travels beside the model, what happens around a
client's training, and how the server's next state follows.
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

__all__ = ["ClientReply", "LocalRule", "LocalWork", "Mean", "Rule", "State", "Visit"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class ClientReply:
    """What the server has of one client's round, decoded, finite and of the right shapes.

    Attributes:
        client: its name.
        examples: its number of training examples.
        state: the client's model by all names of the server's state; the private ones are the
            server's own, the same in every answer.
        records: what the client's half of the rule has sent beside the model.
        report: small values of the client's half of the rule.
        received: the shared model as this client received it, where a codec lost something of it;
            None where it is what was sent.
    """

    client: str
    examples: float
    state: State
    records: Mapping[str, State] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)
    received: State | None = None


Mean = Callable[[Sequence[ClientReply]], State]
"""The user's own ``ServerAggregator.aggregate``, over models, weighted by examples."""


class Rule(ABC):
    """The server's half.

    Attributes:
        name: of the optimizer, as FedML's key ``federated_optimizer`` has it.
        prepares: whether clients are asked for something at the server's state before any of them
            trains (Mime's gradients). Only the single process offers that.
        trained: names of the parameters that are trained and shared, which the rule is about; the
            engine sets it before the first round. All other names of the state are averaged.
        mends: what FedML's own single process computes otherwise, for the log; "" for nothing.
    """

    name: str = ""
    prepares: bool = False
    trained: frozenset[str] = frozenset()
    mends: str = ""

    def begin(self, server_round: int, x: State, clients: Sequence[str]) -> None:  # noqa: B027
        """A round begins.

        Args:
            server_round: the first is 1.
            x: the server's state; not to be changed.
            clients: who is asked.
        """

    def prepared(self, answers: Sequence[ClientReply]) -> None:  # noqa: B027
        """Take in what the clients found at x; only where `prepares`; ``state`` is x itself."""

    def records(self) -> Mapping[str, State]:
        """What travels to the clients beside the model, by name; empty records are left out."""
        return {}

    def task(self, client: str) -> Mapping[str, Any]:
        """Small JSON values for one client."""
        return {}

    @abstractmethod
    def step(self, x: State, answers: Sequence[ClientReply], mean: Mean) -> State:
        """The server's next state, with the same names.

        Args:
            x: the state that the clients started from.
            answers: of the round, at least one.
            mean: see `Mean`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a server that is started again must know: plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Undo `state_dict`."""


@dataclass(frozen=True)
class Visit:
    """What a client's half is told of one round.

    Attributes:
        client: its name.
        server_round: the first is 1.
        task: what the server's half said to this client.
        records: what it sent beside the model.
        storage: bytes by key that this client keeps between rounds; they last once its reply is
            complete, and not before.
        train_data: the client's training data.
        device: to train on.
        args: FedML's.
        trainer: the user's ClientTrainer, or the default.
        exchanged: names of the model's state that travel; None for all.
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
class LocalWork:
    """What a client's half adds to the reply; filled when its context is left.

    Attributes:
        records: tensors beside the model, by name.
        report: small JSON values.
        on_encoded: called once the reply is encoded and nothing has been kept yet, with what the
            codec lost of each record: the tensors given minus those that the server will decode.
            The model's record is called ``model``.
    """

    records: dict[str, State] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    on_encoded: Callable[[Mapping[str, State]], None] | None = None


class LocalRule:
    """The client's half; this one adds nothing.

    Attributes:
        updates: names of `LocalWork.records` that are themselves an update, such as a variate's
            change: the codec takes no difference of them, and keeps no error of them.
    """

    updates: frozenset[str] = frozenset()

    def trainer(self, model: nn.Module, args: Any) -> Any | None:
        """A ClientTrainer of the rule's own where the user gives none; None for FedML's default."""
        return None

    def prepare(self, model: nn.Module, visit: Visit) -> LocalWork:
        """What the server asked for before training; see `Rule.prepares`.

        Raises:
            MismatchError: this rule has nothing that goes before it: the server runs another one.
        """
        name = getattr(visit.args, "federated_optimizer", "FedAvg")
        raise MismatchError(
            f"the server asks for what goes before training, as Mime does, and this client runs "
            f"{name}; set the same federated_optimizer in the YAML of all sides"
        )

    @contextmanager
    def around(self, model: nn.Module, visit: Visit) -> Iterator[LocalWork]:
        """Be around the training.

        Entered when the model has been loaded (shared as received, private of this client), left
        when the trainer's ``train`` has returned.
        """
        yield LocalWork()
