"""What the server does: FedAvg, an evaluation after every round, and a note of how it went."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result

from digits_app.task import Net, load_test_data, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for the rounds that the run config asks for."""
    config = context.run_config
    seed = int(config["seed"])
    torch.manual_seed(seed)
    global_model = Net()

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        return global_evaluate(server_round, arrays, seed)

    strategy = FedAvg(fraction_evaluate=float(config["fraction-evaluate"]))
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(global_model.state_dict()),
        train_config=ConfigRecord({"lr": float(config["learning-rate"])}),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=evaluate_fn,
    )

    if config["results"]:
        Path(str(config["results"])).write_text(json.dumps(summary(result), indent=1))
    if config["final-model"]:
        torch.save(result.arrays.to_torch_state_dict(), str(config["final-model"]))


def global_evaluate(server_round: int, arrays: ArrayRecord, seed: int) -> MetricRecord:
    """Evaluate the server's model on the global test set."""
    model = Net()
    model.load_state_dict(arrays.to_torch_state_dict())
    loss, accuracy = test(model, load_test_data(seed))
    return MetricRecord({"accuracy": accuracy, "loss": loss})


def summary(result: Result) -> dict[str, Any]:
    """Return one row a round; round 0 is the server's model before any training."""
    rows: list[dict[str, Any]] = []
    for server_round, metrics in sorted(result.evaluate_metrics_serverapp.items()):
        trained = result.train_metrics_clientapp.get(server_round, {})
        evaluated = result.evaluate_metrics_clientapp.get(server_round, {})
        rows.append(
            {
                "round": server_round,
                "server_accuracy": metrics["accuracy"],
                "server_loss": metrics["loss"],
                "client_accuracy": evaluated.get("eval_acc"),
                "train_loss": trained.get("train_loss"),
            }
        )
    return {"rounds": rows}
