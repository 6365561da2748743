"""What the server does: FedAvg, with an evaluation after every round."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from lightning_app.task import pretrained, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for the rounds that the run config asks for."""
    config = context.run_config
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid,
        initial_arrays=ArrayRecord(pretrained().state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        evaluate_fn=evaluate,
    )
    if config["final-model"]:
        torch.save(result.arrays.to_torch_state_dict(), str(config["final-model"]))


def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
    """Evaluate the server's model."""
    model = pretrained()
    model.load_state_dict(arrays.to_torch_state_dict())
    return MetricRecord({"accuracy": test(model)})
