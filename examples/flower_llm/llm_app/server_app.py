"""What the server does: FedAvg of adapters, and the adapter in PEFT's files at the end."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from llm_app.models import get_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train for the rounds that the run config asks for."""
    config = context.run_config
    model = get_model(config)
    result = FedAvg(fraction_evaluate=0.0).start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=int(config["num-server-rounds"]),
    )
    if config["save-path"]:
        set_peft_model_state_dict(model, result.arrays.to_torch_state_dict())
        model.save_pretrained(str(config["save-path"]))
