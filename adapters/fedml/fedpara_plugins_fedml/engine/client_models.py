"""The models of a process's clients: the server's part, and each client's own."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins import MismatchError, ModelSpec, merge
from fedpara_plugins.exchange import (
    ClientRound,
    ClientState,
    OwnModel,
    OwnModels,
    ReceivedRecord,
    RecordKind,
    own_checkpoint,
)
from fedpara_plugins.models import adopt_plans, rank_hint
from fedpara_plugins_fedml.engine.client_storage import ClientStorages
from fedpara_plugins_fedml.engine.models import (
    dense_of,
    exchanged,
    frozen_of,
    plain_state,
    spec_for,
    to_state,
)
from fedpara_plugins_fedml.messages.envelope import unpack
from fedpara_plugins_fedml.messages.head import MODEL, Head
from fedpara_plugins_fedml.rules import State
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["ClientModels"]

REMEDY = "Set the same fedpara_codec in the YAML of both"


class ClientModels:
    """Loads clients' models into the trainer's one model, tests and exports them.

    Args:
        settings: of the run.
        args: FedML's.
        device: FedML's.
        trainer: the user's ClientTrainer or FedML's default; its model is converted, or plain where
            clients train dense.
        factors: the same model, converted; None for the trainer's own.
        updates: names of the optimizer's records that are differences already.
        parts: states of the model's size in a message.
    """

    def __init__(
        self,
        settings: FedMLSettings,
        args: Any,
        device: torch.device,
        trainer: Any,
        factors: nn.Module | None = None,
        *,
        updates: Collection[str] = (),
        parts: int = 2,
    ) -> None:
        self._settings = settings
        self._args = args
        self._device = device
        self._trainer = trainer
        self._factors: nn.Module = trainer.model if factors is None else factors
        names = to_state(trainer.get_model_params())
        self._names = frozenset(names)
        self._like = {name: value.to("meta") for name, value in names.items()}
        nbytes = sum(value.nbytes for value in names.values())
        if settings.trains_dense:
            nbytes += sum(value.nbytes for value in self._factors.state_dict().values())
        self._nbytes = nbytes
        self._spec = self._exchanged()
        self._own = OwnModels(settings.config, [OwnModel(self._spec, nbytes)], complete=True)
        self._agreed = False
        self._start = frozen_of(trainer.model, names)
        self._storages = ClientStorages(settings.state_dir)
        self._updates = updates
        self._parts = parts

    def take_final(self, client: str, data: object) -> State:
        """Give the trainer's model the state of a message, with this client's private part.

        Returns:
            The server's state, for `export`.

        Raises:
            FedParaError: the message cannot be used.
        """
        envelope = unpack(data)
        Head.from_json(envelope.head)  # a message without a sound head is refused as a whole
        with contextlib.closing(self._storages.open(client)) as storage:
            model = self._received(self._round_of(ClientState(storage)), envelope.payloads)
        self._trainer.set_id(int(client))
        self._give_trainer(model.user_tensors)
        private = self._spec.private_keys
        return {name: value for name, value in model.full.items() if name not in private}

    def load(self, client: str | None, state: Mapping[str, Tensor]) -> None:
        """Give the trainer's model a server's state, completed with this client's private part.

        Args:
            client: its name; None takes the state as it is.
            state: of the server.
        """
        self._trainer.set_id(int(client or 0))
        full = dict(state) if client is None else self._completed(client, state)
        self._give_trainer(self._loadable(full))

    def _give_trainer(self, state: Mapping[str, Tensor]) -> None:
        """Let the trainer load a state into its model.

        Raises:
            MismatchError: the model holds an adapter of another rank.
        """
        try:
            self._trainer.set_model_params(plain_state(state))
        except Exception as error:  # the user's code
            if (hint := rank_hint(error)) is not None:
                raise MismatchError(hint) from error
            raise

    def _completed(self, client: str, state: Mapping[str, Tensor]) -> State:
        with contextlib.closing(self._storages.open(client)) as storage:
            private, _ = ClientState(storage).private(self._spec, state)
        shared = {k: v for k, v in state.items() if k not in self._spec.private_keys}
        return merge(self._spec, shared, private)

    def export(self, client: str, state: Mapping[str, Tensor]) -> None:
        """Write the client's own dense model, where ``fedpara_client_checkpoints`` is set."""
        folder = self._settings.client_checkpoints
        if folder is not None:
            model, full = self._trainer.model, self._completed(client, state)
            own_checkpoint(
                folder,
                client,
                {**to_state(model.state_dict()), **self._loadable(full)}
                if self._settings.trains_dense
                else dense_of(model, full, private=True),
                method=self._settings.config.method,
                outages=self._storages.outages,
            )

    def log_missing(self) -> None:
        """Log what this process's clients could not write, as the last line of their run."""
        self._storages.outages.log_last_line()

    def test(self, data: Any) -> Any:
        """Return what the trainer's ``test`` says of the model that was loaded last."""
        return self._trainer.test(data, self._device, self._args)

    def _round_of(self, state: ClientState) -> ClientRound:
        """Return the round of a message to the client that has this state."""
        return ClientRound(
            self._settings,
            state,
            own=self._own,
            kind_of=self._kind_of,
            parts=self._parts,
            remedy=REMEDY,
            states=self._states,
        )

    def _states(self) -> list[tuple[ModelSpec, Mapping[str, Tensor]]]:
        """Return the trainer's model, with its frozen tensors as they were at the start."""
        return [(self._spec, {**self._trainer.model.state_dict(), **self._start})]

    def _kind_of(self, record: str) -> RecordKind:
        if record == MODEL:
            return "model"
        return "update" if record in self._updates else "side"

    def _loadable(self, full: State) -> State:
        """Return what the trainer's model loads."""
        return self._spec.dense_state(full) if self._settings.trains_dense else full

    def _exchanged(self) -> ModelSpec:
        """Return the spec of what the trainer exchanges."""
        if self._factors is self._trainer.model:
            return spec_for(self._factors, self._like)
        return exchanged(self._factors, self._names)

    def _received(self, client_round: ClientRound, payloads: Mapping[str, bytes]) -> ReceivedRecord:
        """Decode a message, and return the model in it.

        The plans that follow from the weights that the server starts from are taken over from its
        first message, before models are compared.

        Raises:
            LostReferenceError, ConfigError, PayloadError: see `ClientRound.receive`.
            MismatchError: the server's model is another, or there is none.
        """
        if not self._agreed:
            for plans in client_round.described_plans(payloads):
                adopt_plans(self._factors, plans)
            spec = self._exchanged()
            if spec.fingerprint != self._spec.fingerprint:
                self._spec = spec
                self._own.add(spec, self._nbytes)
        received = client_round.receive(payloads)
        if MODEL not in received:
            raise MismatchError("the server's message holds no model")
        self._agreed = True
        return received[MODEL]
