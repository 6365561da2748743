"""Predictions of `fedpara plan --input` against measured steps.

    python benchmarks/plan_step.py [--only vgg16 ...] [--rounds 12]

For the models of `benchmarks/step.py`: the predicted ratio of a step with factors to the dense
step, and the measured one (process-CPU time, in turns, one thread: median and quartiles).
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable

import torch
from step import machine
from step_clock import ratios
from step_models import resnet18
from torch import Tensor, nn
from vgg16_update import vgg16

from fedpara_plugins import FedParaConfig, convert
from fedpara_plugins.cli.step_cost import step_cost

VGG16 = {"gamma": 0.1, "exclude": "0,45,47,49"}
RESNET18 = {"gamma": 0.1, "exclude": "0,14"}
MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, object], tuple[int, ...]]] = {
    "VGG16, batch 16": (vgg16, VGG16, (16, 3, 32, 32)),
    "VGG16, batch 64": (vgg16, VGG16, (64, 3, 32, 32)),
    "ResNet18, batch 16": (resnet18, RESNET18, (16, 3, 64, 64)),
    "ResNet18, batch 64": (resnet18, RESNET18, (64, 3, 64, 64)),
    "Linear 512, batch 16": (lambda: nn.Linear(512, 512), {"rank": 23}, (16, 512)),
    "Linear 512, batch 256": (lambda: nn.Linear(512, 512), {"rank": 23}, (256, 512)),
    "Linear 4096, batch 64": (lambda: nn.Linear(4096, 4096), {"rank": 64}, (64, 4096)),
    "LSTM 8-256-256, T 80, batch 16": (
        lambda: nn.LSTM(8, 256, num_layers=2, batch_first=True), {"gamma": 0.1}, (16, 80, 8)
    ),
}  # fmt: skip


def training_step(model: nn.Module, x: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-12)

    def step() -> None:
        optimizer.zero_grad()
        output = model(x)
        (output if isinstance(output, Tensor) else output[0]).square().sum().backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of names")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine(), flush=True)
    print("\n| model | predicted | measured (quartiles) | predicted / measured |")
    print("| --- | ---: | ---: | ---: |", flush=True)
    for name, (make, given, shape) in MODELS.items():
        if not name.lower().startswith(tuple(word.lower() for word in options.only)):
            continue
        dense, x = make(), torch.randn(shape)
        config = FedParaConfig.from_mapping({"method": "fedpara", **given})
        predicted = step_cost(dense, config, [x]).ratio
        model = convert(copy.deepcopy(dense), config)
        steps = {"dense": training_step(dense, x), "fedpara": training_step(model, x)}
        measured = ratios(steps, options.rounds)["fedpara"]
        off = predicted / measured.median
        print(f"| {name} | {predicted:.3f} | {measured} | {off:.2f} |", flush=True)


if __name__ == "__main__":
    main()
