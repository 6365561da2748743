"""What a client does: train the received model on its own images."""

from __future__ import annotations

from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lightning_app.task import load_data, pretrained, trainer

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model with Lightning, and return it."""
    config: Any = context.run_config
    content: Any = msg.content
    model = pretrained()
    model.load_state_dict(content["arrays"].to_torch_state_dict())
    model.learning_rate = config["learning-rate"]
    loader = load_data(
        int(str(context.node_config["partition-id"])),
        int(str(context.node_config["num-partitions"])),
        config["batch-size"],
    )
    fit = trainer(config["local-epochs"])
    fit.fit(model, loader)

    metrics = {
        "train_loss": float(fit.callback_metrics["train_loss"]),
        "num-examples": len(loader.dataset),  # type: ignore[arg-type]
    }
    arrays = ArrayRecord(model.state_dict())
    return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)}), reply_to=msg)
