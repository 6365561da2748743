"""A client's training and an evaluation: the user's code of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from setting import Setting
from tasks import Share, Task
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["accuracy", "start", "train"]


def start(task: Task, setting: Setting, kept: Path | None = None) -> nn.Module:
    """Return the model that a run starts from: dense, drawn from the seed, or pretrained.

    Args:
        task: of the run.
        setting: of the run.
        kept: folder in which pretrained models are kept for other runs.
    """
    torch.manual_seed(setting.seed)
    model = task.build()
    if setting.he:
        he_start(model)
    if setting.pretrained and task.before is not None:
        name = f"pretrained-{setting.task}-{setting.seed}-{setting.pretrained}.pt".replace(" ", "")
        path = None if kept is None else kept / name
        if path is not None and path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        draw = torch.Generator().manual_seed(setting.seed)
        x, y = task.before
        for _ in range(setting.pretrained):
            batch = torch.randint(len(x), (64,), generator=draw)
            step(model, optimizer, x[batch], y[batch])
        if path is not None:
            torch.save(model.state_dict(), path)
    return model


def train(model: nn.Module, share: Share, task: Task, setting: Setting, draw: int) -> int:
    """Train as one client in one round.

    Args:
        model: with the round's first state; changed in place.
        share: of the client.
        task: of the run.
        setting: of the run.
        draw: seed of the batches.

    Returns:
        The number of steps.
    """
    x, y = share
    generator = torch.Generator().manual_seed(draw)
    rate = task.rate if setting.rate is None else setting.rate
    moved = [p for p in model.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in moved] if setting.prox else []
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(moved, lr=rate)
        if setting.adam
        else torch.optim.SGD(moved, lr=rate, momentum=setting.momentum)
    )
    model.train()
    for batch in batches(len(x), task, setting, generator):
        step(model, optimizer, x[batch], y[batch], setting.prox, first)
    return rounds_steps(len(x), task, setting)


def step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    prox: float = 0.0,
    first: list[Tensor] | None = None,
) -> None:
    """Take one step, with FedProx's term where ``prox`` is given."""
    optimizer.zero_grad()
    logits = model(x)
    loss = cross_entropy(logits.flatten(0, -2), y.flatten())
    if prox:
        moved = (p for group in optimizer.param_groups for p in group["params"])
        pairs = zip(moved, first or [], strict=True)
        loss = loss + prox / 2 * sum(((p - q).square().sum() for p, q in pairs), torch.zeros(()))
    loss.backward()
    optimizer.step()


def batches(size: int, task: Task, setting: Setting, generator: torch.Generator) -> list[Tensor]:
    """Return the places of each step's examples: whole passes, or a number of steps of them."""
    wanted = rounds_steps(size, task, setting)
    found: list[Tensor] = []
    while len(found) < wanted:
        found += torch.randperm(size, generator=generator).split(task.batch)
    return found[:wanted]


def rounds_steps(size: int, task: Task, setting: Setting) -> int:
    """Return the steps of a client's round."""
    return setting.steps or task.epochs * -(-size // task.batch)


@torch.no_grad()
def accuracy(model: nn.Module, share: Share) -> float:
    """Return the share of right answers in percent."""
    model.eval()
    right = total = 0
    for x, y in zip(share[0].split(500), share[1].split(500), strict=True):
        answers = model(x).flatten(0, -2).argmax(1)
        right += int((answers == y.flatten()).sum())
        total += y.numel()
    return 100 * right / max(total, 1)


@torch.no_grad()
def he_start(model: nn.Module) -> None:
    """Draw the weights of convolutions and linear layers with variance 2 / fan_in."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
