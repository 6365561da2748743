"""A client's round that trains dense and projects at its end, next to its two alternatives.

    python benchmarks/dense_local.py [--only small vgg16 lstm] [--steps 1 8 32] [--repeats 5]

For each number of local steps three rounds are timed in turns in this process, with one thread:
the dense model's, that of ``local = "dense"`` (compose, the same dense steps, project), and that of
factors. Every round starts from the same weights, and loads them. The row is the ratio of
process-CPU time to the dense round's, median and quartiles. Break-even is the number of steps from
which on projecting costs less than training factors: what a round takes longer than the dense one
(from the shortest rounds, whose difference is the clearest) over what a step on factors takes
longer (from the longest). Last, the share of a round's update that five iterations keep, and
thirty. Data are random.
"""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from step import images, machine
from step_clock import Ratio, ratios
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from vgg16_update import vgg16

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec
from fedpara_plugins.exchange import DenseRound
from fedpara_plugins.factors.projection import project

RATE = 0.01


@dataclass
class Case:
    """A model and its batch.

    Attributes:
        name: in the table.
        dense: the plain model.
        options: of the conversion.
        x: inputs.
        y: class indices.
    """

    name: str
    dense: nn.Module
    options: dict[str, object]
    x: Tensor
    y: Tensor


class Last(nn.Module):
    """An LSTM's classes from its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, 80)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        return self.head(output[:, -1])  # type: ignore[no-any-return]


def small() -> Case:
    """Return three convolutions and a linear layer, as for digits, batch 20."""
    dense = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(4, 64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, 2, 1), nn.GroupNorm(4, 64), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 4, 128), nn.ReLU(), nn.Linear(128, 10),
    )  # fmt: skip
    x, y = torch.randn(20, 1, 8, 8), torch.randint(10, (20,))
    return Case("small CNN, batch 20", dense, {"gamma": 0.1}, x, y)


def vgg() -> Case:
    """Return VGG16 for 32x32 images, batch 16; stem and linear layers dense."""
    x, y = images(16, 32)
    return Case("VGG16, batch 16", vgg16(), {"gamma": 0.1, "exclude": "0,45,47,49"}, x, y)


def lstm() -> Case:
    """Return an LSTM with two layers of 256 units, 80 time steps, batch 16."""
    x, y = torch.randn(16, 80, 8), torch.randint(80, (16,))
    return Case("LSTM 8-256-256, T 80, batch 16", Last(), {"gamma": 0.1}, x, y)


CASES: dict[str, Callable[[], Case]] = {"small": small, "vgg16": vgg, "lstm": lstm}


def train(model: nn.Module, case: Case, steps: int) -> None:
    """Train with plain SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(case.x), case.y).backward()
        optimizer.step()


def rounds(case: Case, steps: int) -> dict[str, Callable[[], object]]:
    """Return the three rounds to time."""
    model = fedpara.convert(copy.deepcopy(case.dense), method="fedpara", **case.options)
    spec, full = ModelSpec.of(model), copy.deepcopy(model.state_dict())
    plain, local = copy.deepcopy(case.dense), copy.deepcopy(case.dense)
    start = spec.dense_state(full)

    def dense() -> None:
        plain.load_state_dict(start)
        train(plain, case, steps)

    def projected() -> None:
        found = DenseRound(spec, full)
        local.load_state_dict(found.dense)
        train(local, case, steps)
        found.to_factors(local.state_dict())

    def factors() -> None:
        model.load_state_dict(full)
        train(model, case, steps)

    return {"dense": dense, 'local = "dense"': projected, "factors": factors}


def kept_shares(case: Case, steps: int) -> str:
    """Say how much of a round's update the layers keep, with five iterations and with thirty."""
    model = fedpara.convert(copy.deepcopy(case.dense), method="fedpara", **case.options)
    spec, full = ModelSpec.of(model), model.state_dict()
    start = spec.dense_state(full)
    plain = copy.deepcopy(case.dense)
    plain.load_state_dict(start)
    train(plain, case, steps)
    found: dict[int, list[float]] = {5: [], 30: []}
    for weight, plan in spec.weights.items():
        factors = {factor: full[key] for factor, key in spec.factor_keys(weight).items()}
        for count, shares in found.items():
            after = plain.state_dict()[weight]
            kept = project(plan, factors, start[weight], after, iterations=count).kept
            shares.append(kept or 0.0)
    few, many = found[5], found[30]
    gain = [b / a - 1 for a, b in zip(few, many, strict=True)]
    return (
        f"{case.name}, {steps} steps: 5 iterations keep {min(few):.3f} to {max(few):.3f} of the "
        f"layers' updates; 30 keep {100 * min(gain):.1f} to {100 * max(gain):.1f} % more of it"
    )


def break_even(shortest: dict[str, Ratio], longest: dict[str, Ratio], steps: int) -> str:
    """Return the break-even from the medians of the shortest and the longest rounds."""
    dense, local, _ = (each.seconds for each in shortest.values())
    overhead = local - dense
    dense, _, factors = (each.seconds for each in longest.values())
    gain = (factors - dense) / steps
    if gain <= 0:
        return "break-even: none, a step on factors costs no more than a dense one"
    return (
        f"break-even at {overhead / gain:.1f} local steps: composing and projecting take "
        f"{1000 * overhead:.3g} ms a round, factors {1000 * gain:.3g} ms more a step"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=[*CASES], default=[])
    parser.add_argument("--steps", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine(), flush=True)
    print("\n| what | local steps | round | ratio (quartiles) | ms | load |")
    print("| --- | ---: | --- | ---: | ---: | ---: |", flush=True)
    notes = []
    for case in (CASES[name]() for name in options.only or CASES):
        measured = []
        for steps in sorted(options.steps):
            repeats = max(4, options.repeats * 8 // max(8, steps))
            found = ratios(rounds(case, steps), repeats)
            measured.append(found)
            for name, ratio in found.items():
                what = "1" if name == "dense" else str(ratio)
                load = f"{os.getloadavg()[0]:.1f}"
                cells = (case.name, steps, name, what, f"{1000 * ratio.seconds:.4g}", load)
                print("|", " | ".join(map(str, cells)), "|", flush=True)
        notes += [f"{case.name}: {break_even(measured[0], measured[-1], max(options.steps))}"]
        notes += [kept_shares(case, max(options.steps))]
    print("\n".join(["", *notes]))


if __name__ == "__main__":
    main()
