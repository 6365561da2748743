"""The server: FedAvg with all clients in every round."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import fedpara_plugins_flower as fedpara
from wire_app.vgg16_update import vgg16

vgg16 = fedpara.factorised(vgg16)
app = fedpara.server_app(ServerApp())


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train and evaluate in every round."""
    clients = int(context.run_config["clients"])
    torch.manual_seed(0)
    strategy = FedAvg(
        min_train_nodes=clients, min_evaluate_nodes=clients, min_available_nodes=clients
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(vgg16().state_dict()),
        num_rounds=int(context.run_config["rounds"]),
    )
