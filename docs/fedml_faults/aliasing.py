"""FedML hands out the model's live tensors where a copy is needed (single process, CPU).

`get_model_params()` of the trainers in `fedml/ml/trainer` returns `self.model.cpu().state_dict()`.
On a CPU these are the model's own tensors, so that what is kept as "the global model" changes while
a client trains. Repair: return `{k: v.clone() for k, v in ...}`, or `copy.deepcopy` it in
`train()`.
"""

from __future__ import annotations

from typing import Any

import torch
from small import CPU, Fault, arguments, dataset, one_weight, report, weight


def adding(trainer: Any, numbers: list[float]) -> None:
    """Make the trainer's next trainings add these numbers to the weights."""
    left = iter(numbers)

    def train(data: Any, device: Any, args: Any, *more: Any) -> int:
        with torch.no_grad():
            next(trainer.model.parameters()).add_(next(left))
        return 1  # SCAFFOLD's trainer returns the number of its steps

    trainer.train = train


def fedavg_first_round() -> Fault:
    """Run round 0 of `simulation/sp/fedavg/fedavg_api.py`; later rounds are right.

    FedProx has the same fault.
    """
    from fedml.simulation.sp.fedavg import FedAvgAPI

    model = one_weight()
    api = FedAvgAPI(arguments("FedAvg"), CPU, dataset(), model)
    adding(api.model_trainer, [1.0, 3.0])
    api.train()
    got = weight(model)
    return Fault(
        f"from 0, clients that add 1 and 3 average to {got:g}: the second began at the first's 1",
        "each begins at 0, so the mean of 1 and 3: 2",
        got != 2,
    )


def fedprox_first_round() -> Fault:
    """Run the same round of `simulation/sp/fedprox/fedprox_trainer.py`."""
    from fedml.simulation.sp.fedprox.fedprox_trainer import FedProxTrainer

    model = one_weight()
    api = FedProxTrainer(dataset(), model, CPU, arguments("FedProx", fedprox_mu=0.0))
    adding(api.model_trainer, [1.0, 3.0])
    api.train()
    got = weight(model)
    return Fault(f"as FedAvg: {got:g}", "2", got != 2)


def fedopt_every_round() -> Fault:
    """Run a round of `simulation/sp/fedopt/fedopt_api.py`; every round has the fault."""
    from fedml.simulation.sp.fedopt.fedopt_api import FedOptAPI

    model = one_weight()
    api = FedOptAPI(
        arguments("FedOpt", server_optimizer="sgd", server_lr=0.0), CPU, dataset(), model
    )
    adding(api.model_trainer, [1.0, 3.0])
    api.train()
    got = weight(model)
    return Fault(
        f"with server_lr 0 the global model goes from 0 to {got:g}, what the last client came to "
        f"after it had trained on the first one's result",
        "a server step of rate 0 leaves the model at 0",
        got != 0,
    )


def feddyn_every_round() -> Fault:
    """Run the server of `simulation/sp/feddyn/feddyn_trainer.py`.

    It takes the last client's weights for the round's first ones (`old_w_global`), and the first
    round is sequential too.
    """
    from fedml.simulation.sp.feddyn.feddyn_trainer import FedDynTrainer

    model = one_weight()
    api = FedDynTrainer(dataset(), model, CPU, arguments("FedDyn", feddyn_alpha=1.0))
    left = iter([1.0, 3.0])

    def train(data: Any, device: Any, args: Any, dual: Any) -> Any:
        with torch.no_grad():
            model.weight.copy_(torch.full((2, 2), next(left)))
        return dual

    api.model_trainer.train = train
    api.train()
    got = weight(model)
    return Fault(
        f"clients that come from 0 to 1 and 3 with alpha 1 give {got:g}: h is made from their "
        f"distance to the last client's 3",
        "h = -(1 + 3) / 2 = -2, mean - h / alpha = 4",
        got != 4,
    )


def scaffold_first_round() -> Fault:
    """Run round 0 of `simulation/sp/scaffold/scaffold_trainer.py`.

    The global model to which the clients' changes are added has already been trained.
    """
    from fedml.simulation.sp.scaffold.scaffold_trainer import ScaffoldTrainer

    model = one_weight()
    api = ScaffoldTrainer(dataset(), model, CPU, arguments("SCAFFOLD", server_lr=0.0))
    adding(api.model_trainer, [1.0, 3.0])
    api.train()
    got = weight(model)
    return Fault(
        f"with server_lr 0 the global model goes from 0 to {got:g}",
        "a server step of rate 0 leaves the model at 0",
        got != 0,
    )


def mime_every_round() -> Fault:
    """Run a round of `simulation/sp/mime/mime_trainer.py`; every round has the fault."""
    from fedml.simulation.sp.mime.mime_trainer import MimeTrainer

    keys = {"server_optimizer": "sgd", "server_momentum": 0.0, "momentum": 0.0, "mimelite": True}
    model = one_weight()
    api = MimeTrainer(dataset(), model, CPU, arguments("Mime", server_lr=0.0, **keys))
    left = iter([1.0, 3.0])

    def train(data: Any, device: Any, args: Any, *more: Any) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            model.weight.add_(next(left))
        return {"weight": torch.zeros(2, 2)}

    api.model_trainer.train = train
    api.train()
    got = weight(model)
    return Fault(f"from 0, clients that add 1 and 3 average to {got:g}", "2", got != 2)


REPRODUCTIONS = (
    fedavg_first_round,
    fedprox_first_round,
    fedopt_every_round,
    feddyn_every_round,
    scaffold_first_round,
    mime_every_round,
)

if __name__ == "__main__":
    report(*REPRODUCTIONS)
