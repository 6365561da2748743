"""A client's training and an evaluation: the user's code of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from setting import Setting
from tasks import Share, Task
from torch import nn
from torch.nn.functional import cross_entropy

__all__ = ["accuracy", "start", "train"]

BATCH = 64
"""Examples of a step before the run."""


def start(task: Task, setting: Setting, kept: Path | None = None) -> nn.Module:
    """Return the model that a run starts from: dense, drawn from the seed, or pretrained.

    A pretrained model is the same for all seeds, as one that is downloaded would be.

    Args:
        task: of the run.
        setting: of the run.
        kept: folder in which pretrained models are kept for other runs.
    """
    pretrained = setting.pretrained and task.before is not None
    torch.manual_seed(0 if pretrained else setting.seed)
    model = task.build()
    for module in model.modules() if setting.he else ():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    if not pretrained or task.before is None:
        return model
    name = f"pretrained-{setting.task}-{setting.pretrained}.pt".replace(" ", "")
    path = None if kept is None else kept / name
    if path is not None and path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    draw = torch.Generator().manual_seed(0)
    x, y = task.before()
    for number in range(setting.pretrained):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - number / setting.pretrained)
        batch = torch.randint(len(x), (BATCH,), generator=draw)
        step(model, optimizer, (x[batch], y[batch]))
    if path is not None:
        torch.save(model.state_dict(), path)
    return model


def train(
    model: nn.Module, share: Share, *, rate: float, draw: int, batch: int = 32, steps: int = 0
) -> int:
    """Train as one client in one round.

    Args:
        model: with the round's first state; changed in place.
        share: of the client.
        rate: of SGD.
        draw: seed of the batches.
        batch: examples of each.
        steps: their number, in as many passes over the data as they take; 0 for one pass.

    Returns:
        The number of steps.
    """
    x, y = share
    generator = torch.Generator().manual_seed(draw)
    order = list(torch.randperm(len(x), generator=generator).split(batch))
    while len(order) < steps:
        order += torch.randperm(len(x), generator=generator).split(batch)
    order = order[: steps or None]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for chosen in order:
        step(model, optimizer, (x[chosen], y[chosen]))
    return len(order)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Share) -> None:
    """Take one step."""
    optimizer.zero_grad()
    cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, share: Share) -> float:
    """Return the share of right answers in percent."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(share[0].split(500), share[1].split(500), strict=True)
    )
    return 100 * right / len(share[1])
