"""Every kind of training loop with every option that acts on steps, against written-out steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fedpara_plugins as fedpara
from fedpara_plugins.optimizers import LocalFedDyn
from harness.cells.loops import LOOP_CELLS, LOOP_OPTIONS, LoopCell
from harness.loops.apps import InOrder, LightningNet, TransformersNet, lightning_fit
from harness.matrix.results import CellResult
from harness.oracles.plain_steps import (
    PlainNet,
    PlainOptions,
    PlainScheduleFree,
    batches,
    distance,
    loss_of,
    plain_steps,
)

LR = 0.01
NEAR = 1e-6
"""Float64; relative to the way that the model went. The clip adds as much to the norm."""

STEPS = 6
SKIPPED = (1, 4)
"""Steps whose gradients overflow under a scaler."""

PLAIN = {
    "clip": PlainOptions(clip=0.5),
    "relative": PlainOptions(relative=0.002, speed=0.1),
    "decay": PlainOptions(decay=0.5),
    "schedule": PlainOptions(private_steps=2),
    "feddyn": PlainOptions(alpha=5.0),
}
Steps = Sequence[Sequence[Tensor]]
Loop = Callable[[nn.Module, torch.optim.Optimizer, Steps, Path], None]


def sgd(parameters: Any, decay: float = 0.0, fused: bool = False) -> torch.optim.Optimizer:
    # torch's fused momentum is not initialised by a first step that is skipped
    momentum = 0.0 if fused else 0.9
    return torch.optim.SGD(parameters, lr=LR, momentum=momentum, weight_decay=decay, fused=fused)


def schedule_free(parameters: Any, decay: float = 0.0) -> torch.optim.Optimizer:
    optimizer = schedulefree.SGDScheduleFree(parameters, lr=LR, weight_decay=decay)
    optimizer.train()
    return optimizer  # type: ignore[no-any-return]


def plain(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Steps, folder: Path) -> None:
    for (x,) in steps:
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()


def closure(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Steps, folder: Path) -> None:
    for (x,) in steps:

        def computed(x: Tensor = x) -> float:
            optimizer.zero_grad()
            loss = loss_of(model(x))
            loss.backward()
            return float(loss.detach())

        optimizer.step(computed)


def with_lightning(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Steps, folder: Path
) -> None:
    lightning_fit(LightningNet(model, lambda _: optimizer), [x for (x,) in steps], folder)


def with_transformers(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Steps, folder: Path
) -> None:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    InOrder(
        model=TransformersNet(model),
        args=arguments,
        train_dataset=[{"x": x} for (x,) in steps],
        optimizers=(optimizer, constant),
    ).train()


def with_accelerate(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Steps, folder: Path
) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(steps[0]))
    loader = DataLoader([x for both in steps for x in both], batch_size=None)  # type: ignore[arg-type]
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    for x in loader:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model(x)))
            prepared.step()
            prepared.zero_grad()


def scaler(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Steps, folder: Path) -> None:
    scaling = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for place, (x,) in enumerate(steps):
        optimizer.zero_grad()
        scaling.scale(loss_of(model(x))).backward()
        if place in SKIPPED:
            gradient = next(p.grad for p in model.parameters() if p.grad is not None)
            gradient.view(-1)[0] = torch.inf
        scaling.step(optimizer)
        scaling.update()


RUN: dict[str, Loop] = {
    "plain": plain,
    "closure": closure,
    "lightning": with_lightning,
    "transformers": with_transformers,
    "accelerate": with_accelerate,
    "scaler": scaler,
    "scaler-fused": scaler,
    "schedulefree": plain,
}


def build(option: str, **more: Any) -> tuple[nn.Sequential, str]:
    """Convert the net; what acts on shared parameters alone has no private ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40))
    method = "fedpara" if option in ("decay", "feddyn") else "pfedpara"
    slow = {"variance": "torch", "speed": 0.25, "private_speed": 0.2, "clip": "none"}
    options = {**slow, **LOOP_OPTIONS.get(option, {}), **more}
    return fedpara.convert(model, method=method, gamma=0.5, **options).double(), method


def acting(option: str, model: nn.Module) -> AbstractContextManager[Any]:
    return LocalFedDyn(model, alpha=PLAIN["feddyn"].alpha) if option == "feddyn" else nullcontext()


@pytest.mark.parametrize("cell", LOOP_CELLS, ids=lambda cell: cell.id)
def test_cell(cell: LoopCell, result: CellResult, tmp_path: Path) -> None:
    model, method = build(cell.option)
    drawn = [x.double() for x in batches(2 * STEPS)]
    steps = [[x] for x in drawn[:STEPS]]
    if cell.loop == "accelerate":
        steps = [drawn[place : place + 2] for place in range(0, 2 * STEPS, 2)]
    skipped = SKIPPED if cell.loop.startswith("scaler") else ()
    options = PLAIN[cell.option]

    def optimizer(parameters: Any, decay: float = 0.0) -> Any:
        if cell.loop == "schedulefree":
            return schedule_free(parameters, decay)
        return sgd(parameters, decay, fused=cell.loop == "scaler-fused")

    def oracle(parameters: list[Tensor]) -> Any:
        if cell.loop == "schedulefree":
            return PlainScheduleFree(parameters, LR)
        return optimizer(parameters)

    wanted, free = (
        plain_steps(PlainNet(model, method), oracle, steps, one, skipped=skipped)
        for one in (options, PlainOptions())
    )
    with acting(cell.option, model):
        RUN[cell.loop](model, optimizer(model.parameters(), options.decay), steps, tmp_path)
    result.note(off=distance(model, wanted), without=distance(model, free))
    assert distance(model, wanted) < NEAR
    assert distance(model, free) > 0.02
