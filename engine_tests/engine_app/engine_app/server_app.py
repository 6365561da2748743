"""The server side, after the README's edit."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import fedpara_plugins_flower as fedpara
from engine_app.task import Net, TrainingTask, evaluate

Net = fedpara.factorised(Net)
app = fedpara.server_app(ServerApp())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg with all clients in each round."""
    torch.set_num_threads(1)
    clients = int(context.run_config["clients"])
    task = TrainingTask(clients=clients, rounds=int(context.run_config["rounds"]), epochs=1)
    torch.manual_seed(task.seed)
    model = Net()

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model = Net()
        model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
        loss, accuracy = evaluate(model, task.test_data())
        return MetricRecord({"loss": loss, "accuracy": accuracy})

    strategy = FedAvg(
        min_train_nodes=clients, min_evaluate_nodes=clients, min_available_nodes=clients
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=task.rounds,
        train_config=ConfigRecord({"lr": task.lr}),
        evaluate_fn=evaluate_fn,
    )
    folder = Path(str(context.run_config["results"]))
    torch.save(result.arrays.to_torch_state_dict(), folder / "final.pt")
    measured = result.evaluate_metrics_serverapp
    losses = [float(measured[number]["loss"]) for number in sorted(measured)]
    own = result.evaluate_metrics_clientapp
    accuracies = [float(own[number]["eval_acc"]) for number in sorted(own)]
    text = json.dumps({"losses": losses, "client_accuracies": accuracies})
    (folder / "figures.json").write_text(text)
