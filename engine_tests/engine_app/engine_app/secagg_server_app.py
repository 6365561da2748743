"""The server side of the same problem with the legacy SecAgg+ workflow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.common import ndarrays_to_parameters
from flwr.server import LegacyContext, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.serverapp import Grid, ServerApp
from numpy.typing import NDArray

import fedpara_plugins_flower as fedpara
from engine_app.task import Net, TrainingTask, evaluate

Net = fedpara.factorised(Net)
app = fedpara.server_app(ServerApp())

Arrays = list[NDArray[Any]]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run FedAvg over masked sums, with all clients in each round."""
    torch.set_num_threads(1)
    clients = int(context.run_config["clients"])
    task = TrainingTask(clients=clients, rounds=int(context.run_config["rounds"]), epochs=1)
    folder = Path(str(context.run_config["results"]))
    losses: list[float] = []

    def evaluate_fn(
        server_round: int, arrays: Arrays, config: dict[str, Any]
    ) -> tuple[float, dict[str, Any]]:
        model = Net()
        pairs = zip(model.state_dict(), arrays, strict=True)
        model.load_state_dict({k: torch.as_tensor(v) for k, v in pairs}, strict=True)
        loss, accuracy = evaluate(model, task.test_data())
        losses.append(loss)
        torch.save(model.state_dict(), folder / "final.pt")
        return loss, {"accuracy": accuracy}

    torch.manual_seed(task.seed)
    start = [value.numpy().copy() for value in Net().state_dict().values()]
    strategy = FedAvg(
        min_fit_clients=clients,
        min_evaluate_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters(start),
        evaluate_fn=evaluate_fn,
        on_fit_config_fn=lambda server_round: {"server-round": server_round},
    )
    legacy = LegacyContext(
        context=context, config=ServerConfig(num_rounds=task.rounds), strategy=strategy
    )
    workflow = SecAggPlusWorkflow(
        num_shares=clients,
        reconstruction_threshold=2,
        max_weight=500,
        clipping_range=3.0,
        quantization_range=2**20,  # one step is 6e-6
        modulus_range=2**30,
    )
    DefaultWorkflow(fit_workflow=workflow)(grid, legacy)
    (folder / "figures.json").write_text(json.dumps({"losses": losses}))
