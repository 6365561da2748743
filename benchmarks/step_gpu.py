"""Time of a training step on a GPU, next to dense and to peers, in three precisions.

    python benchmarks/step_gpu.py [--device cuda] [--precision float32 tf32 bf16] [--only vgg16]

Milliseconds of wall-clock time of a step, and its ratio to the dense one's: all contenders in
turns, each for a stretch of steps that ends with the device idle; medians and quartiles. bf16 is
autocast.
Memory is the largest that a step allocated beyond what was there before. Peers are left out, with a
word, where they are not installed. ``--device cpu`` shows that the benchmark itself works; for
figures of a CPU use `benchmarks/step.py`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median, quantiles

import torch
from step import machine
from step_models import factorised, lycoris_loha, peft_loha, ranks, resnet18
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from vgg16_update import vgg16

Models = dict[str, nn.Module]
PEERS = {"PEFT LoHa": ("peft", peft_loha), "LyCORIS LoHa": ("lycoris", lycoris_loha)}

WARM_UP, STRETCH, TURNS = 10, 10, 15
"""Steps before the first is timed; steps of a stretch; stretches of each contender."""


@dataclass
class Case:
    """Models for one batch of pictures, or of rows; the first is dense."""

    name: str
    models: Models
    x: Tensor
    y: Tensor | None


def with_choices(dense: nn.Module, **options: object) -> Models:
    """Return the factorised model as it comes and with each `recompute`, and the peers'."""
    models: Models = {"dense": dense, "fedpara": factorised(dense, **options)}
    for choice in (False, True):
        models[f"fedpara, recompute={choice}"] = factorised(dense, recompute=choice, **options)
    for name, (package, adapt) in PEERS.items():
        if find_spec(package) is not None:
            models[name] = adapt(dense, ranks(models["fedpara"]))
    return models


def vgg16_cases() -> Iterator[Case]:
    """Yield VGG16 on 32x32 images with stem and linear layers dense, gamma 0.1."""
    for batch in (16, 64, 256):
        models = with_choices(vgg16(), gamma=0.1, exclude="0,45,47,49")
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
        yield Case(f"VGG16, batch {batch}", models, x, y)


def resnet18_cases() -> Iterator[Case]:
    """Yield ResNet18 on 64x64 pictures, gamma 0.1, stem and head dense."""
    for batch in (16, 64):
        models = with_choices(resnet18(), gamma=0.1, exclude="0,14")
        x, y = torch.randn(batch, 3, 64, 64), torch.randint(0, 10, (batch,))
        yield Case(f"ResNet18, batch {batch}", models, x, y)


def linear_cases() -> Iterator[Case]:
    """Yield single layers, their step of SGD included."""
    for size, rank in ((512, 23), (4096, 64)):
        for batch in (16, 64, 256, 1024):
            models = with_choices(nn.Sequential(nn.Linear(size, size)), rank=rank)
            yield Case(
                f"Linear {size}, r {rank}, batch {batch}", models, torch.randn(batch, size), None
            )


CASES = {"vgg16": vgg16_cases, "resnet18": resnet18_cases, "linear": linear_cases}


def precision(name: str, device: str) -> AbstractContextManager[object]:
    """Return the precision in which a step runs."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = name == "tf32"
    return torch.autocast(device, dtype=torch.bfloat16) if name == "bf16" else nullcontext()


def step_of(model: nn.Module, case: Case, name: str, device: str) -> Callable[[], object]:
    """Make one training step with SGD."""
    x = case.x.to(device)
    y = None if case.y is None else case.y.to(device)
    trained = [p for p in model.to(device).parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        with precision(name, device):
            output = model(x)
            loss = output.square().mean() if y is None else cross_entropy(output, y)
        loss.backward()
        optimizer.step()

    return step


def idle(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


def peak_mib(step: Callable[[], object], device: str) -> str:
    """Return the peak MiB of one step beyond what was allocated before it."""
    if device != "cuda":
        return ""
    idle(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    idle(device)
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.0f}"


def rows(case: Case, name: str, device: str) -> Iterator[str]:
    """Yield the lines of the table."""
    steps = {who: step_of(model, case, name, device) for who, model in case.models.items()}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[float]] = {who: [] for who in steps}
    for turn in range(TURNS):
        for who in steps if turn % 2 == 0 else reversed(steps):
            idle(device)
            start = time.perf_counter()
            for _ in range(STRETCH):
                steps[who]()
            idle(device)
            times[who].append((time.perf_counter() - start) / STRETCH)
    for who, own in times.items():
        each = [a / b for a, b in zip(own, times["dense"], strict=True)]
        low, _, high = quantiles(each, n=4)
        ratio = "1" if who == "dense" else f"{median(each):.3f} ({low:.3f}-{high:.3f})"
        peak = peak_mib(steps[who], device)
        yield f"| {case.name} | {name} | {who} | {ratio} | {1000 * median(own):.3f} | {peak} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--precision", nargs="*", default=["float32", "tf32", "bf16"])
    parser.add_argument("--only", nargs="*", choices=[*CASES], default=[])
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu tries the benchmark out")
    torch.manual_seed(0)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{device}; {machine()}\n", flush=True)
    missing = [name for name, (package, _) in PEERS.items() if find_spec(package) is None]
    if missing:
        print(f"Not installed, left out: {', '.join(missing)}\n")
    print("| what | precision | contender | ratio (quartiles) | ms | peak MiB |")
    print("| --- | --- | --- | ---: | ---: | ---: |", flush=True)
    for section in options.only or CASES:
        for case in CASES[section]():
            for name in options.precision:
                for row in rows(case, name, options.device):
                    print(row, flush=True)


if __name__ == "__main__":
    main()
