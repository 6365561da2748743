"""A client: a few steps of SGD, and an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.nn.functional import cross_entropy

import fedpara_plugins_flower as fedpara
from wire_app.data import held_out, training
from wire_app.vgg16_update import vgg16

vgg16 = fedpara.factorised(vgg16)
app = ClientApp(mods=[fedpara.client_mod])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Take steps on images that differ from round to round."""
    client, model = _begin(message, context)
    images, labels = training(client, int(context.node_config["num-partitions"]))
    config = context.run_config
    draw = torch.Generator().manual_seed(1000 * message.content["config"]["server-round"] + client)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["learning-rate"])
    for _ in range(config["steps"]):
        chosen = torch.randint(len(images), (config["batch-size"],), generator=draw)
        optimizer.zero_grad()
        loss = cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    metrics = MetricRecord({"train_loss": loss.item(), "num-examples": len(images)})
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate on images that this client never trains on."""
    client, model = _begin(message, context)
    images, labels = held_out(client)
    with torch.no_grad():
        logits = model(images)
    metrics: dict[str, Any] = {"eval_loss": cross_entropy(logits, labels).item()}
    metrics |= {"eval_acc": float((logits.argmax(1) == labels).float().mean())}
    metrics |= {"num-examples": len(labels)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)


def _begin(message: Message, context: Context) -> tuple[int, nn.Module]:
    torch.set_num_threads(1)
    model = vgg16()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
    return int(context.node_config["partition-id"]), model
