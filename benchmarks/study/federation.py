"""A federated run in this process, over the exchange that the adapters use.

Every message is a real payload: the server encodes it against what the client holds, the client
decodes it with what it keeps, and so back. Bytes are lengths of payloads.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from aggregation import aggregate
from local import accuracy, start, train
from setting import Setting
from tasks import Share, Task
from torch import Tensor

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec, PayloadError
from fedpara_plugins.exchange import (
    ClientRound,
    ClientState,
    DownlinkEncoder,
    ExchangeSettings,
    OwnModel,
    OwnModels,
    ReplyReader,
    zero_private_factors,
)
from fedpara_plugins.models import frozen_tensors
from fedpara_plugins.training import start_round

__all__ = ["Federation"]

RECORD = "model"
State = dict[str, Tensor]


@dataclass
class Bytes:
    """Bytes of payloads so far.

    Attributes:
        up: from clients.
        down: to clients that had something already.
        first: to clients that had nothing.
    """

    up: int = 0
    down: int = 0
    first: int = 0


class Federation:
    """A run: its server, and all of its clients' storages.

    Args:
        task: of the setting.
        setting: of the run.
        kept: folder for pretrained models.

    Attributes:
        number: rounds done.
        diverged: whether all clients of the last round have.
        bytes: sent so far.
    """

    def __init__(self, task: Task, setting: Setting, kept: Path | None = None) -> None:
        self.number = 0
        self.diverged = False
        self.bytes = Bytes()
        self._setting = setting
        self._settings = ExchangeSettings(**ExchangeSettings.read(dict(setting.options)))
        self._storages: dict[int, dict[str, bytes]] = {}
        dense = start(task, setting, kept)
        for name, parameter in dense.named_parameters():
            if setting.trainable and not any(fnmatchcase(name, p) for p in setting.trainable):
                parameter.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._model = fedpara.convert(dense, self._settings.config)
        self._spec = ModelSpec.of(self._model)
        self._first = {k: v.detach().clone() for k, v in self._model.state_dict().items()}
        server = copy.deepcopy(self._model)
        zero_private_factors(server)
        self._state: State = {k: v.detach().clone() for k, v in server.state_dict().items()}
        self._frozen = {k: v.detach().clone() for k, v in frozen_tensors(self._model).items()}
        self._downlink = DownlinkEncoder(self._settings)

    def round(self, task: Task) -> dict[str, Any]:
        """Run one round of FedAvg, and return its line.

        Args:
            task: of the setting.
        """
        self.number += 1
        setting = self._setting
        draw = torch.Generator().manual_seed(1000 * setting.seed + self.number)
        chosen = torch.randperm(len(task.clients), generator=draw)[: task.sampled].tolist()
        self._downlink.put(RECORD, self._state, self._spec, frozen=self._frozen)
        self._state = dict(self._downlink.content(RECORD))
        states = {client: self._client(client, task) for client in chosen}
        replies = [(s, len(task.clients[c][1])) for c, s in states.items() if s is not None]
        self.diverged = not replies
        missed = None
        if replies:
            self._state, missed = aggregate(setting.aggregation, self._spec, replies, self._state)
        line: dict[str, Any] = {
            "round": self.number,
            "up": self.bytes.up,
            "down": self.bytes.down,
            "first": self.bytes.first,
        }
        if self.diverged:
            line["diverged"] = True
        else:
            line |= self._figures(task)
            if missed is not None:
                line["missed"] = round(missed, 4)
        return line

    # One client

    def _client(self, client: int, task: Task) -> State | None:
        """Send to one client, train there, and return the server's view of its answer.

        Returns:
            None if the client's training has diverged, which leaves it out of the round.
        """
        storage = self._storages.setdefault(client, {})
        seen = bool(storage)
        state = ClientState(storage, str(client))
        own = OwnModel(self._spec, sum(v.nbytes for v in self._state.values()))
        client_round = ClientRound(
            self._settings,
            state,
            own=OwnModels(self._settings.config, [own], complete=True),
            kind_of=lambda record: "model",
            states=lambda: [(self._spec, {**self._first, **self._frozen})],
        )
        payload = self._downlink.encode(str(client), RECORD)
        if seen:
            self.bytes.down += len(payload)
        else:
            self.bytes.first += len(payload)
        received = client_round.receive({RECORD: payload})[RECORD]
        self._model.load_state_dict(received.user_tensors)
        start_round(self._model, previous_steps=client_round.previous_steps)
        draw = hash((self._setting.seed, self.number, client)) % 2**31
        rate = task.rate if self._setting.rate is None else self._setting.rate
        steps = train(
            self._model,
            task.clients[client],
            rate=rate,
            draw=draw,
            batch=task.batch,
            steps=self._setting.steps,
        )
        answer = {k: v.detach().clone() for k, v in self._model.state_dict().items()}
        reader = ReplyReader(
            self._downlink,
            kind_of=lambda record: "model",
            model_of=lambda tensors: self._spec,
            strict=True,
        )
        try:
            coded = client_round.encode(client_round.prepare_reply({RECORD: answer}))
            client_round.keep(steps=steps)
            self.bytes.up += len(coded[RECORD])
            read = reader.read_all(coded)[RECORD]
        except PayloadError:
            return None
        held = {**reader.references, **client_round.received_hashes}
        self._downlink.acknowledge(str(client), held, client_round.decoders)
        return read.state

    # Evaluation

    def _figures(self, task: Task) -> dict[str, float]:
        """Return the accuracy of the server's model, and of the clients' own at the end."""
        last = self.number == self._setting.rounds
        if self.number % self._setting.every and not last:
            return {}
        self._model.load_state_dict(self._state)
        found = {"accuracy": accuracy(self._model, task.test)}
        if task.own and last:
            own = [self._own(c, share) for c, share in enumerate(task.own)]
            found["own"] = sum(own) / len(own)
        return found

    def _own(self, client: int, share: Share) -> float:
        """Return the accuracy of what a client would use: the server's part and its own."""
        private, _ = ClientState(self._storages.get(client, {})).private(self._spec, self._state)
        self._model.load_state_dict({**self._state, **private})
        return accuracy(self._model, share)
