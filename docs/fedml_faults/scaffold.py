"""SCAFFOLD, single process, on any device: two faults in addition to those of `aliasing.py`."""

from __future__ import annotations

import torch
from small import CPU, Fault, arguments, dataset, one_weight, report


def variates_stay_zero() -> Fault:
    """Compare a client's variate with the distance it has moved.

    `simulation/sp/scaffold/client.py` puts the new variate into the dict that `state_dict()` made,
    and not into the model, so that c_i stays as it was. Repair: `copy_` into the tensors.
    """
    from fedml.simulation.sp.scaffold.client import Client
    from fedml.simulation.sp.scaffold.scaffold_trainer import ScaffoldTrainer

    api = ScaffoldTrainer(dataset(), one_weight(), CPU, arguments("SCAFFOLD"))
    client: Client = api.client_list[0]
    x = {"weight": torch.zeros(2, 2)}
    client.train({k: v.clone() for k, v in x.items()}, api.c_model_global.state_dict())
    moved = float(client.model_trainer.model.weight.detach().abs().max())
    kept = float(client.c_model_local.weight.detach().abs().max())
    return Fault(
        f"one step of rate 1 moves a weight by {moved:.3f}; the client's variate is {kept:g} after",
        f"c_i = c_i - c + (x - y) / (K lr), so {moved:.3f} for that weight",
        abs(kept - moved) > 1e-6,
    )


def last_client_replaces_all() -> Fault:
    """Aggregate the changes of two clients.

    `torch_aggregator` in `ml/aggregator/agg_operator.py` overwrites the sums by the last client's
    change, for the weights and for c. Repair: drop the two lines after the loop.
    """
    from fedml.ml.aggregator.agg_operator import FedMLAggOperator

    def one(number: float) -> tuple[float, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return 4.0, {"weight": torch.tensor([number])}, {"weight": torch.tensor([number])}

    x, c = FedMLAggOperator.agg(arguments("SCAFFOLD"), [one(1.0), one(3.0)])
    got = float(x["weight"]), float(c["weight"])
    return Fault(
        f"of changes 1 and 3 of two equal clients the server takes {got[0]:g} for x, {got[1]:g} "
        f"for c: the last client's alone",
        "their mean, 2, for x and (1 + 3) / N = 2 for c",
        got != (2.0, 2.0),
    )


REPRODUCTIONS = (variates_stay_zero, last_client_replaces_all)

if __name__ == "__main__":
    report(*REPRODUCTIONS)
