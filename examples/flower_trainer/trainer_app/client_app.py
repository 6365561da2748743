"""What a client does: train the received model on its own images."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from transformers import Trainer, TrainingArguments

from trainer_app.task import get_model, load_data

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model with Hugging Face's Trainer, and return it."""
    content: Any = msg.content
    node = context.node_config
    trainset = load_data(int(str(node["partition-id"])), int(str(node["num-partitions"])))
    model = get_model(str(context.run_config["model-name"]))
    model.load_state_dict(content["arrays"].to_torch_state_dict())

    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=training_arguments(context.run_config, folder),
            train_dataset=trainset,
        )
        results = trainer.train()

    arrays = ArrayRecord(model.state_dict())
    metrics = MetricRecord({"train_loss": results.training_loss, "num-examples": len(trainset)})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)


def training_arguments(config: Any, folder: str) -> TrainingArguments:
    """Return the settings of Hugging Face's Trainer."""
    return TrainingArguments(
        output_dir=folder,
        learning_rate=config["learning-rate"],
        max_steps=config["max-steps"],
        per_device_train_batch_size=config["batch-size"],
        gradient_checkpointing=bool(config["gradient-checkpointing"]),
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
