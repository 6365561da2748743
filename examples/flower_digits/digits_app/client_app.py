"""What a client does: train on its own images, evaluate on those that it held out."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits_app.task import Net, load_data
from digits_app.task import test as test_fn
from digits_app.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model on this client's training images."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    trainloader, _ = _load_data(context, msg.content["config"]["server-round"])

    train_loss = train_fn(
        model,
        trainloader,
        context.run_config["local-epochs"],
        msg.content["config"]["lr"],
    )

    metrics = MetricRecord({"train_loss": train_loss, "num-examples": _size(trainloader)})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the received model on this client's held-out images."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    _, heldoutloader = _load_data(context, msg.content["config"]["server-round"])

    eval_loss, eval_acc = test_fn(model, heldoutloader)

    metrics = {"eval_loss": eval_loss, "eval_acc": eval_acc, "num-examples": _size(heldoutloader)}
    return Message(content=RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)


def _load_data(context: Context, server_round: int) -> Any:
    return load_data(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        context.run_config["batch-size"],
        context.run_config["seed"],
        server_round,
    )


def _size(loader: Any) -> int:
    return len(loader.dataset)
