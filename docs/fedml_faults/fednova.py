"""FedNova, single process, against arXiv 2007.07481."""

from __future__ import annotations

import torch
from small import CPU, Fault, arguments, dataset, report
from torch import Tensor, nn

KEYS = {"gmf": 0.0, "mu": 0.0, "momentum": 0.0, "dampening": 0.0, "wd": 0.0, "nesterov": False}


def global_momentum_is_forgotten() -> Fault:
    """Compare trainings with and without `gmf`.

    `train()` in `simulation/sp/fednova/fednova_trainer.py` creates `global_momentum_buffer` again
    in every round, so `gmf` has no effect. Repair: create it in `__init__`.
    """
    from fedml.simulation.sp.fednova.fednova_trainer import FedNovaTrainer

    ends = []
    for gmf in (1e-12, 0.9):
        torch.manual_seed(0)
        model = nn.Linear(2, 2)
        args = arguments("FedNova", comm_round=3, **{**KEYS, "gmf": gmf})
        FedNovaTrainer(dataset(), model, CPU, args).train()
        ends.append(model.weight.detach().clone())
    same = torch.equal(*ends)
    return Fault(
        f"three rounds with gmf 0 and with gmf 0.9 end at the same weights: {same}",
        "buffer = gmf buffer + step over all rounds, so they differ from the second round on",
        same,
    )


def normalising_vector_with_both() -> Fault:
    """Compare the normaliser with the length of the steps, with momentum and mu together.

    `fednova.py` adds up the two recursions of |a|. The sum is the length of neither kind of step,
    nor of the steps that it takes.
    """
    from fedml.simulation.sp.fednova.fednova import FedNova

    p = nn.Parameter(torch.zeros(1))
    optimizer = FedNova([p], ratio=1.0, gmf=0.0, mu=0.1, lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
    told = float(optimizer.local_normalizing_vec)
    way = -float(p.detach()) / 0.1
    return Fault(
        f"three steps of momentum 0.9 with lr mu = 0.01 have |a| = {told:.4f}",
        f"{way:.4f}: how far, in units of the rate, its own steps with gradients of 1 went",
        abs(told - way) > 1e-3,
    )


def integer_buffers_raise() -> Fault:
    """Train a model with BatchNorm.

    `get_local_norm_grad` in `simulation/sp/fednova/client.py` scales every entry of the state in
    place, including BatchNorm's counters.
    """
    from fedml.simulation.sp.fednova.fednova_trainer import FedNovaTrainer

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)
            self.out = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.norm(x))
            return y

    try:
        FedNovaTrainer(dataset(), Net(), CPU, arguments("FedNova", **KEYS)).train()
    except RuntimeError as error:
        return Fault(f"a model with BatchNorm: RuntimeError: {error}", "buffers are averaged", True)
    return Fault("a model with BatchNorm trains", "buffers are averaged", False)


REPRODUCTIONS = (
    global_momentum_is_forgotten,
    normalising_vector_with_both,
    integer_buffers_raise,
)

if __name__ == "__main__":
    report(*REPRODUCTIONS)
