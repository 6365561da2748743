"""The client side, after the README's edit."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

import fedpara_plugins_flower as fedpara
from engine_app.noted_app import NotedClientApp
from engine_app.task import Net, TrainingTask, evaluate, train

Net = fedpara.factorised(Net)
app = NotedClientApp(mods=[fedpara.client_mod])


@app.train()
def fit(message: Message, context: Context) -> Message:
    """Train on this client's images."""
    client, config, task, model = _begin(message, context)
    server_round = config["server-round"]
    _note(model, context, f"{client}-{server_round}-before.pt")
    loss = train(model, task.batches(client, server_round), lr=config["lr"])
    _note(model, context, f"{client}-{server_round}-after.pt")
    time.sleep(context.run_config["pause"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": task.size(client)})
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def score(message: Message, context: Context) -> Message:
    """Evaluate on the images that this client never trains on."""
    client, _, task, model = _begin(message, context)
    data = task.held_out(client)
    loss, accuracy = evaluate(model, data)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data[1])}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _begin(message: Message, context: Context) -> tuple[int, Any, TrainingTask, nn.Module]:
    torch.set_num_threads(1)
    clients = int(context.node_config["num-partitions"])
    model = Net()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
    task = TrainingTask(clients=clients, rounds=context.run_config["rounds"], epochs=1)
    return int(context.node_config["partition-id"]), message.content["config"], task, model


def _note(model: nn.Module, context: Context, name: str) -> None:
    """Write the model's state for the test, whole or not at all."""
    if folder := context.run_config["diary"]:
        path = Path(folder) / name
        torch.save(model.state_dict(), path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)
