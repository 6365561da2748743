"""FedNova, single process, against arXiv 2007.07481."""

from __future__ import annotations

import torch
from small import CPU, Fault, arguments, dataset, report
from torch import Tensor, nn

KEYS = {"gmf": 0.0, "mu": 0.0, "momentum": 0.0, "dampening": 0.0, "wd": 0.0, "nesterov": False}


def global_momentum_is_forgotten() -> Fault:
    """`train()` in `simulation/sp/fednova/fednova_trainer.py` makes `global_momentum_buffer` anew
    in every round, so `gmf` has no effect. Cure: make it in `__init__`."""
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


def proximal_term_enters_the_momentum() -> Fault:
    """`fednova.py` adds `mu (p - p0)` in place to `d_p`, which is the momentum buffer itself, so
    that the pull is counted again in every later step. Cure: `d_p = d_p.add(...)`."""
    from fedml.simulation.sp.fednova.fednova import FedNova

    p = nn.Parameter(torch.zeros(1))
    optimizer = FedNova([p], ratio=1.0, gmf=0.0, mu=1.0, lr=1.0, momentum=0.5)
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
    got = float(p.detach())
    buffer, right = 0.0, 0.0
    for _ in range(3):
        buffer = 0.5 * buffer + 1.0
        right -= buffer + 1.0 * (right - 0.0)
    return Fault(
        f"three steps with gradient 1, mu 1, momentum 0.5 and rate 1 end at {got:g}",
        f"{right:g}, with a buffer of gradients alone",
        abs(got - right) > 1e-6,
    )


def normalising_vector_with_both() -> Fault:
    """With momentum and mu together `fednova.py` adds both terms up: the local normaliser |a| is
    neither that of the steps that it takes, nor the paper's for one of them."""
    from fedml.simulation.sp.fednova.fednova import FedNova

    p = nn.Parameter(torch.zeros(1))
    optimizer = FedNova([p], ratio=1.0, gmf=0.0, mu=0.1, lr=0.1, momentum=0.9)
    for _ in range(3):
        p.grad = torch.ones(1)
        optimizer.step()
    got = float(optimizer.local_normalizing_vec)
    buffer, way = 0.0, 0.0
    for _ in range(3):
        buffer = 0.9 * buffer + 1.0
        way += buffer - 0.1 * 0.1 * way
    return Fault(
        f"three steps of momentum 0.9 with lr mu = 0.01 have |a| = {got:.4f}",
        f"{way:.4f}: how far, in units of the rate, unit gradients take the weight",
        abs(got - way) > 1e-3,
    )


def integer_buffers_raise() -> Fault:
    """`get_local_norm_grad` in `simulation/sp/fednova/client.py` scales every entry of the state in
    place, BatchNorm's counters among them."""
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
    proximal_term_enters_the_momentum,
    normalising_vector_with_both,
    integer_buffers_raise,
)

if __name__ == "__main__":
    report(*REPRODUCTIONS)
