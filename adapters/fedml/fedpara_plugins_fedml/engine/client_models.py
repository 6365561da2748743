"""The models of a process's clients: the server's part, and of each client its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins import merge
from fedpara_plugins.exchange import ClientState
from fedpara_plugins.models import save_dense
from fedpara_plugins_fedml.engine.client_storage import ClientStorages
from fedpara_plugins_fedml.engine.models import dense_of, exchanged, plain_state, spec_for, to_state
from fedpara_plugins_fedml.engine.tasks import Task, read_task
from fedpara_plugins_fedml.messages.envelope import Envelope, unpack
from fedpara_plugins_fedml.messages.head import MODEL, Head
from fedpara_plugins_fedml.rules import State
from fedpara_plugins_fedml.settings import FedMLSettings as Settings

__all__ = ["ClientModels"]


class ClientModels:
    """Loads them into the trainer's one model, tests and exports them.

    Args:
        settings: of the run.
        args: FedML's.
        device: FedML's.
        trainer: the user's ClientTrainer or FedML's default; its model is converted, or plain where
            clients train dense.
        factors: the same model, converted; None for the trainer's own.
    """

    def __init__(
        self,
        settings: Settings,
        args: Any,
        device: torch.device,
        trainer: Any,
        factors: nn.Module | None = None,
    ) -> None:
        self._settings = settings
        self._args = args
        self._device = device
        self._trainer = trainer
        names = to_state(trainer.get_model_params())
        self._names = frozenset(names)
        if factors is None or factors is trainer.model:
            self._spec = spec_for(trainer.model, names)
        else:
            self._spec = exchanged(factors, names)
        self._storages = ClientStorages(settings.state_dir)

    def take_final(self, client: str, data: object) -> State:
        """Give the trainer's model the state of a message, with this client's private part.

        Returns:
            The server's state, for `export`.

        Raises:
            FedParaError: the message cannot be used.
        """
        envelope = unpack(data)
        with contextlib.closing(self._storages.open(client)) as storage:
            task = self._task(Head.from_json(envelope.head), envelope, ClientState(storage))
        self._trainer.set_id(int(client))
        self._trainer.set_model_params(plain_state(self._loadable(task.full)))
        return dict(task.received[MODEL].tensors)

    def load(self, client: str | None, state: Mapping[str, Tensor]) -> None:
        """Give the trainer's model a server's state, completed with this client's private part.

        Args:
            client: its name; None takes the state as it is.
            state: of the server.
        """
        self._trainer.set_id(int(client or 0))
        full = dict(state) if client is None else self._completed(client, state)
        self._trainer.set_model_params(plain_state(self._loadable(full)))

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
            save_dense(
                folder / f"client-{client}.safetensors",
                {**to_state(model.state_dict()), **self._loadable(full)}
                if self._settings.trains_dense
                else dense_of(model, full, private=True),
                model=f"the own model of client {client}",
                method=self._settings.config.method,
            )

    def test(self, data: Any) -> Any:
        """What the trainer's ``test`` says of the model that was loaded last."""
        return self._trainer.test(data, self._device, self._args)

    def _task(self, head: Head, envelope: Envelope, kept: ClientState) -> Task:
        return read_task(head, envelope, kept, spec=self._spec, codecs=self._settings.codec_names)

    def _loadable(self, full: State) -> State:
        """What the trainer's model loads."""
        return self._spec.dense_state(full) if self._settings.trains_dense else full
