"""The client side of the same problem in the legacy API, with secure aggregation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.client import Client, NumPyClient
from flwr.client.mod import secaggplus_mod
from numpy.typing import NDArray

import fedpara_plugins_flower as fedpara
from engine_app.noted_app import NotedClientApp
from engine_app.task import Net, TrainingTask, evaluate, train

Net = fedpara.factorised(Net)

Arrays = list[NDArray[Any]]


class DigitsClient(NumPyClient):
    """Trains and evaluates on one client's images."""

    def __init__(self, context: Context) -> None:
        torch.set_num_threads(1)
        config = context.run_config
        self.number = int(context.node_config["partition-id"])
        self.task = TrainingTask(
            clients=int(config["clients"]), rounds=int(config["rounds"]), epochs=1
        )
        self.diary = Path(str(config["diary"]))
        self.model = Net()

    def fit(self, parameters: Arrays, config: dict[str, Any]) -> tuple[Arrays, int, dict[str, Any]]:
        """Train, and note the state afterwards."""
        self._load(parameters)
        server_round = int(config["server-round"])
        loss = train(self.model, self.task.batches(self.number, server_round), lr=self.task.lr)
        path = self.diary / f"{self.number}-{server_round}-after.pt"
        torch.save(self.model.state_dict(), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
        arrays = [value.numpy().copy() for value in self.model.state_dict().values()]
        return arrays, self.task.size(self.number), {"train_loss": loss}

    def evaluate(
        self, parameters: Arrays, config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        """Evaluate on the images that this client never trains on."""
        self._load(parameters)
        data = self.task.held_out(self.number)
        loss, accuracy = evaluate(self.model, data)
        return loss, len(data[1]), {"eval_acc": accuracy}

    def _load(self, parameters: Arrays) -> None:
        pairs = zip(self.model.state_dict(), parameters, strict=True)
        self.model.load_state_dict({k: torch.as_tensor(v) for k, v in pairs}, strict=True)


def client_fn(context: Context) -> Client:
    """Build a client of the legacy API."""
    return DigitsClient(context).to_client()


app = NotedClientApp(client_fn=client_fn, mods=[secaggplus_mod, fedpara.client_mod])
