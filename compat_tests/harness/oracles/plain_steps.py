"""Training steps with clip, decay and schedule written out, on a net of plain matrix products.

Nothing of the plugin computes here: weights are composed by their formula, and each option is done
by hand at its place in the loop. Of the converted model only the first values are taken, and the
fixed scalar of each weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "PlainNet",
    "PlainOptions",
    "PlainScheduleFree",
    "batches",
    "distance",
    "loss_of",
    "plain_steps",
]

SIZE = 30.0
"""What the loss is multiplied by, so that gradients are longer than the bounds in use."""

MakeOptimizer = Callable[[list[Tensor]], Any]


@dataclass(frozen=True)
class PlainOptions:
    """What is to be done by hand.

    Attributes:
        clip: bound of the gradient's norm over all parameters that move.
        relative: bound of each factor's step, as a share of the factor's norm, for a model that was
            converted with torch's variance.
        speed: K of that model, in both halves.
        decay: the user's weight decay, of composed weights; 0 for none.
        decoupled: whether it shrinks the parameter itself, as AdamW's does.
        private_steps: number of private steps before shared ones; None trains both halves.
        alpha: strength of a pull towards the start, added after the clip; 0 for none.
    """

    clip: float | None = None
    relative: float | None = None
    speed: float = 1.0
    decay: float = 0.0
    decoupled: bool = False
    private_steps: int | None = None
    alpha: float = 0.0


class PlainNet:
    """Linear, ReLU, Linear; the weights are s X1 Y1ᵀ, s X1 Y1ᵀ ∘ X2 Y2ᵀ or s X1 Y1ᵀ ∘ (X2 Y2ᵀ + 1).

    Args:
        model: the converted `nn.Sequential` of these layers.
        method: ``lowrank``, ``fedpara`` or ``pfedpara``.
    """

    def __init__(self, model: nn.Sequential, method: str) -> None:
        self.method = method
        self.scales = {place: float(model[place].plans["weight"].scale) for place in (0, 2)}
        self.values = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in model.named_parameters()
        }
        self.start = {name: value.detach().clone() for name, value in self.values.items()}

    def weight(self, place: int, phase: str) -> Tensor:
        """Compose a weight from its factors."""
        factors = [self.values.get(f"{place}.{name}") for name in ("x1", "y1", "x2", "y2")]
        x1, y1, x2, y2 = factors
        assert x1 is not None
        assert y1 is not None
        first = self.scales[place] * x1 @ y1.T
        if x2 is None or y2 is None:
            return first
        if self.method == "fedpara":
            return first * (x2 @ y2.T)
        return {
            "joint": lambda: first * (x2 @ y2.T + 1),
            "private": lambda: first.detach() * (x2 @ y2.T + 1),
            "shared": lambda: first,
        }[phase]()

    def loss(self, x: Tensor, phase: str = "joint") -> Tensor:
        """Compute the loss of a batch."""
        hidden = torch.relu(x @ self.weight(0, phase).T + self.values["0.bias"])
        return loss_of(hidden @ self.weight(2, phase).T + self.values["2.bias"])

    def private(self) -> set[str]:
        """Return the names of the private parameters."""
        own = self.method == "pfedpara"
        return {name for name in self.values if own and name.endswith(("x2", "y2"))}

    def held(self, name: str, gradient: Tensor, options: PlainOptions, rate: float) -> Tensor:
        """Return a gradient after the bound on its factor's step.

        Where K is that of the options and the weight's variance is v = 1 / (3 fan-in), shared
        factors have the variance F v / K. Y2 of pFedPara has K / (v R), and X2, which starts at
        zero, has v / K.
        """
        if options.relative is None or name.endswith("bias"):
            return gradient
        value = self.values[name].detach()
        variance = 1 / (3 * self.values[f"{name[0]}.y1"].shape[0])
        square = variance * self.factors_together(name) / options.speed
        if name in self.private():
            x2, y2 = variance / options.speed, options.speed / (variance * value.shape[1])
            square = x2 if name.endswith("x2") else y2
        bound = options.relative * max(float(value.norm()), (square * value.numel()) ** 0.5)
        length = rate * float(gradient.norm())
        return gradient * (bound / length) if length > bound else gradient

    def factors_together(self, name: str) -> int:
        """Return how many factors shrink one weight, or one half of it, together."""
        if name.endswith("bias"):
            return 1
        return 4 if self.method == "fedpara" else 2


def loss_of(output: Tensor) -> Tensor:
    """Return the loss of a net's output."""
    return SIZE * (output - 3).square().mean()


def batches(count: int) -> list[Tensor]:
    """Return inputs of shape (5, 64), the same in each call."""
    drawn = torch.Generator().manual_seed(7)
    return [torch.randn(5, 64, generator=drawn) for _ in range(count)]


def plain_steps(
    net: PlainNet,
    make_optimizer: MakeOptimizer,
    steps: Sequence[Sequence[Tensor]],
    options: PlainOptions,
    *,
    skipped: Iterable[int] = (),
    names: Sequence[str] | None = None,
) -> PlainNet:
    """Train a net; each entry of ``steps`` holds the batches whose mean gradient is one step.

    Args:
        net: changed in place.
        make_optimizer: makes the user's optimizer, without weight decay.
        steps: the batches of each step.
        options: what is done by hand.
        skipped: places of the steps that are not made.
        names: the parameters that are trained; all if None.
    """
    trained = {name: net.values[name] for name in (names or net.values)}
    optimizer = make_optimizer(list(trained.values()))
    rate = optimizer.param_groups[0]["lr"]
    made = 0
    for place, accumulated in enumerate(steps):
        phase = "joint"
        if options.private_steps is not None:
            phase = "private" if made < options.private_steps else "shared"
        optimizer.zero_grad()
        for x in accumulated:
            (net.loss(x, phase) / len(accumulated)).backward()
        if place in skipped:
            continue
        made += 1
        act(net, trained, options, phase, rate)
        optimizer.step()
    return net


@torch.no_grad()
def act(
    net: PlainNet, trained: dict[str, Tensor], options: PlainOptions, phase: str, rate: float
) -> None:
    """Do to gradients and parameters what the options say, right before a step."""
    if phase != "joint":
        for name, value in trained.items():
            if (name in net.private()) != (phase == "private"):
                value.grad = None
    moving = {name: value for name, value in trained.items() if value.grad is not None}
    if options.clip is not None:
        gradients = [value.grad for value in moving.values() if value.grad is not None]
        norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.mul_(min(1.0, options.clip / float(norm)))
    for name, value in moving.items():
        assert value.grad is not None
        value.grad.copy_(net.held(name, value.grad, options, rate))
        value.grad.add_(value - net.start[name], alpha=options.alpha)
        count = net.factors_together(name)
        if options.decoupled:
            value.mul_((1 - rate * options.decay) ** (1 / count))
        else:
            value.grad.add_(value, alpha=options.decay / count)


def distance(model: nn.Module, net: PlainNet) -> float:
    """Return how far a model ended from a net, relative to the way that the net has gone."""
    own = dict(model.named_parameters())
    off = gone = 0.0
    with torch.no_grad():
        for name, value in net.values.items():
            off += float((own[name] - value).square().sum())
            gone += float((value - net.start[name]).square().sum())
    return float((off / gone) ** 0.5)


class PlainScheduleFree:
    """Schedule-free SGD as published: gradients at y, a plain step of z, and x, the mean of z.

    Args:
        values: what is trained; between steps they are y = (1 - beta) z + beta x.
        lr: the rate.
        beta: the paper's.
    """

    def __init__(self, values: list[Tensor], lr: float, beta: float = 0.9) -> None:
        self.param_groups = [{"params": values, "lr": lr}]
        self.beta = beta
        self.made = 0
        self.z = [value.detach().clone() for value in values]
        self.x = [value.detach().clone() for value in values]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for value in self.param_groups[0]["params"]:
            value.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move what has a gradient."""
        self.made += 1
        group = self.param_groups[0]
        for value, z, x in zip(group["params"], self.z, self.x, strict=True):
            if value.grad is not None:
                z.sub_(group["lr"] * value.grad)
                x.add_((z - x) / self.made)
                value.copy_((1 - self.beta) * z + self.beta * x)
