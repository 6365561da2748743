"""What a client does: train the adapter on its own sequences."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from llm_app.dataset import load_data
from llm_app.models import get_model

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received adapter, and return it."""
    content: Any = msg.content
    trainset = load_data(int(str(context.node_config["partition-id"])))
    model = get_model(context.run_config)
    set_peft_model_state_dict(model, content["arrays"].to_torch_state_dict())

    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=training_arguments(context.run_config, folder),
            train_dataset=trainset,
        )
        results = trainer.train()

    arrays = ArrayRecord(get_peft_model_state_dict(model))
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
