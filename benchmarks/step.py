"""Time of a training step with composed weights, next to dense and to peers: one table.

    python benchmarks/step.py [--only vgg16 linear ...] [--flower models.py] [--scale 1]

Every row is a ratio of process-CPU time to the dense model's, both timed in turns in this process
with one thread: the median and the quartiles. Peers are left out, with a word, where they are not
installed (``pip install --no-deps peft lycoris-lora``; both need further packages). ``--flower`` is
the file ``baselines/fedpara/fedpara/models.py`` of Flower's repository. ``--scale`` multiplies the
number of repetitions.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from step_clock import peak_memory, ratios
from step_models import bound, factorised, flower_models, lycoris_loha, peft_loha, ranks, resnet18
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from vgg16_update import vgg16, vgg16_factors

from fedpara_plugins import composed_once
from fedpara_plugins.factors.fast.native_library import find_kernels

Step = Callable[[], object]
PEERS = {"PEFT LoHa": peft_loha, "LyCORIS LoHa": lycoris_loha}


@dataclass
class Case:
    """Contenders for one line of figures; the first is dense."""

    name: str
    rounds: int
    contenders: dict[str, Step]
    bound: float | None = None
    memory: bool = False
    notes: list[str] = field(default_factory=list)


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    """Make a training step: zero_grad, forward, cross entropy, backward, SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def with_peers(case: Case, dense: nn.Module, model: nn.Module, step: Callable[..., Step]) -> None:
    for name, adapt in PEERS.items():
        try:
            case.contenders[name] = step(adapt(dense, ranks(model)))
        except ImportError as error:
            case.notes.append(f"{name} left out: {error}")


def images(batch: int, side: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, side, side), torch.randint(0, 10, (batch,))


def vgg16_cases() -> Iterator[Case]:
    """Yield VGG16 with stem and linear layers dense, gamma 0.1."""
    for batch, rounds in ((16, 25), (64, 12)):
        x, y = images(batch, 32)
        dense, model = vgg16(), vgg16_factors()
        steps = {"dense": training_step(dense, x, y), "fedpara": training_step(model, x, y)}
        for choice in (False, True):
            other = factorised(vgg16(), gamma=0.1, exclude="0,45,47,49", recompute=choice)
            steps[f"fedpara, recompute={choice}"] = training_step(other, x, y)
        limit = bound(model, dense, x)
        case = Case(f"VGG16, batch {batch}, step", rounds, steps, limit, memory=True)
        with_peers(case, dense, model, lambda adapted, x=x, y=y: training_step(adapted, x, y))
        yield case


def resnet18_cases() -> Iterator[Case]:
    """Yield ResNet18 on 64x64 pictures, gamma 0.1, stem and head dense."""
    for batch, rounds in ((16, 25), (64, 10)):
        x, y = images(batch, 64)
        dense = resnet18()
        model = factorised(dense, gamma=0.1, exclude="0,14")
        steps = {"dense": training_step(dense, x, y), "fedpara": training_step(model, x, y)}
        yield Case(f"ResNet18, batch {batch}, step", rounds, steps, bound(model, dense, x))


def linear_cases() -> Iterator[Case]:
    """Yield forward and backward with the input's gradient, and the optimizer's step apart."""
    for size, rank, rounds in ((512, 23, 80), (4096, 64, 8)):
        dense = nn.Linear(size, size)
        model = factorised(dense, rank=rank)
        for batch in (16, 64, 256, 1024):
            x = torch.randn(batch, size, requires_grad=True)
            probe = torch.randn(batch, size)

            def both(layer: nn.Module, x: Tensor = x, probe: Tensor = probe) -> Step:
                leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
                return lambda: torch.autograd.grad(layer(x), leaves, probe)

            case = Case(
                f"Linear {size}, r {rank}, batch {batch}, forward and backward",
                max(4, rounds // (1 + batch // 512)),
                {"dense": both(dense), "fedpara": both(model)},
                1 + 2 * rank / batch,
                memory=batch == 64,
            )
            holder = nn.Sequential(dense)
            names = nn.Sequential(model)
            with_peers(case, holder, names, both)
            yield case
        optimizers = {"dense": sgd(dense), "fedpara": sgd(model)}
        yield Case(f"Linear {size}, r {rank}, SGD's step alone", rounds, optimizers)


def sgd(layer: nn.Module) -> Step:
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.SGD(layer.parameters(), lr=0.1).step


def lstm_cases() -> Iterator[Case]:
    """Yield LSTMs: 8 features, two layers of 256, 80 time steps, gamma 0.1."""
    dense = nn.LSTM(8, 256, num_layers=2, batch_first=True)
    model = factorised(dense, gamma=0.1)

    def step(layer: nn.Module, x: Tensor) -> Step:
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-5)

        def run() -> None:
            optimizer.zero_grad()
            layer(x)[0].square().mean().backward()
            optimizer.step()

        return run

    for batch, rounds in ((16, 60), (32, 30), (64, 12)):
        x = torch.randn(batch, 80, 8)
        steps = {"dense": step(dense, x), "fedpara": step(model, x)}
        name = f"LSTM 8-256-256, T 80, batch {batch}, step"
        yield Case(name, rounds, steps, bound(model, dense, x))


def evaluation_cases() -> Iterator[Case]:
    """Yield evaluations: batches of 64 without gradients, composing included."""
    linear, attention = nn.Linear(512, 512), nn.MultiheadAttention(256, 8, batch_first=True)
    lstm, tokens = nn.LSTM(8, 256, 2, batch_first=True), torch.randn(64, 16, 256)
    for name, dense, inputs, batches, rounds in (
        ("Linear 512", linear, [torch.randn(64, 512)], 200, 100),
        ("Attention 256", attention, [tokens] * 3, 50, 10),
        ("LSTM 8-256-256", lstm, [torch.randn(64, 80, 8)], 10, 8),
        ("VGG16", vgg16(), [images(64, 32)[0]], 10, 5),
    ):
        options = {"exclude": "0,45,47,49"} if name == "VGG16" else {}
        model = factorised(dense, gamma=0.1, **options).eval()

        def run(
            layer: nn.Module, once: bool, inputs: list[Tensor] = inputs, batches: int = batches
        ) -> Step:
            def evaluate() -> None:
                with torch.no_grad(), composed_once(layer) if once else nullcontext():
                    for _ in range(batches):
                        layer(*inputs)

            return evaluate

        steps = {"dense": run(dense.eval(), once=False)}
        steps["fedpara, composed_once"] = run(model, once=True)
        steps["fedpara"] = run(model, once=False)
        yield Case(f"{name}, evaluation of {batches} batches of 64", rounds, steps)


def accumulation_cases() -> Iterator[Case]:
    """Yield four backward passes and one step of SGD."""
    x, y = images(16, 32)
    dense, model = vgg16(), vgg16_factors()

    def run(network: nn.Module, once: bool) -> Step:
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-5)

        def step() -> None:
            optimizer.zero_grad()
            with composed_once(network) if once else nullcontext():
                for _ in range(4):
                    cross_entropy(network(x), y).backward()
            optimizer.step()

        return step

    steps = {"dense": run(dense, once=False), "fedpara": run(model, once=False)}
    steps["fedpara, composed_once"] = run(model, once=True)
    yield Case("VGG16, 4 micro-batches of 16, step", 8, steps, memory=True)


def flower_cases(path: Path | None) -> Iterator[Case]:
    """Yield Flower's own VGG16, dense and with its own layers at ratio 0.1."""
    if path is None:
        return
    models = flower_models(path)
    for batch, rounds in ((16, 15), (64, 6)):
        x, y = images(batch, 32)
        kinds = {"dense": "standard", "Flower's baseline": "lowrank"}
        steps = {
            name: training_step(models.VGG(10, ratio=0.1, param_type=kind), x, y)
            for name, kind in kinds.items()
        }
        dense = models.VGG(10, param_type="standard")
        model = factorised(dense, gamma=0.1, exclude="features.0,classifier.*")
        steps["fedpara"] = training_step(model, x, y)
        yield Case(f"Flower's VGG16, batch {batch}, step", rounds, steps, memory=True)


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "vgg16": vgg16_cases,
    "resnet18": resnet18_cases,
    "linear": linear_cases,
    "lstm": lstm_cases,
    "evaluation": evaluation_cases,
    "accumulation": accumulation_cases,
}


def rows(case: Case, scale: float) -> Iterator[str]:
    found = ratios(case.contenders, max(4, round(case.rounds * scale)))
    for name, ratio in found.items():
        peak = f"{peak_memory(case.contenders[name]) / 2**20:.1f}" if case.memory else ""
        limit = f"{case.bound:.2f}" if case.bound and name != "dense" else ""
        milliseconds = f"{1000 * ratio.seconds:.3g}"
        load = f"{os.getloadavg()[0]:.1f}"
        what = "1" if name == "dense" else str(ratio)
        yield f"| {case.name} | {name} | {what} | {limit} | {milliseconds} | {peak} | {load} |"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    cpu = ", ".join(models) or platform.processor()
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    kernels = find_kernels().text
    return (
        f"commit {commit or '?'}; {cpu}, {os.cpu_count()} cores; torch {torch.__version__}; "
        f"fedpara-plugins-kernels: {kernels}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=[*CASES, "flower"], default=[])
    parser.add_argument("--flower", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(machine(), flush=True)
    print("\n| what | contender | ratio (quartiles) | bound | ms | peak MiB | load |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
    sections = {**CASES, "flower": lambda: flower_cases(options.flower)}
    notes: set[str] = set()
    for name in options.only or sections:
        for case in sections[name]():
            for row in rows(case, options.scale):
                print(row, flush=True)
            notes.update(case.notes)
    print("\n".join(["", *sorted(notes)]))


if __name__ == "__main__":
    main()
