"""Time and memory of a fine-tuning step in the residual form, next to PEFT's at equal parameters.

    python benchmarks/residual.py [--only transformer resnet18] [--scale 1]

Every ratio is of process-CPU time to that of PEFT's adapter in the first column, timed in turns in
this process with one thread: the median and the quartiles. Peaks are bytes of one step beyond what
was allocated before it. Both sides freeze everything but their adapters, which have equally many
trained parameters. Needs ``peft`` and its requirements.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from step_clock import peak_memory, ratios
from step_models import resnet18
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedpara_plugins as fedpara

Step = Callable[[], object]

TIME, PEAK = 1.1, 1.05
"""The bounds to hold against PEFT: LoRA for lowrank, LoHa for fedpara."""


@dataclass(frozen=True)
class Case:
    """A network and its input."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Tensor
    rank: int
    rounds: int


class Encoder(nn.Module):
    """Blocks of a transformer with linear projections, as in BERT, ViT and Llama."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EncoderBlock(width) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        shape = (*x.shape[:2], -1, 64)
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


def adapted_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that are adapted: all matrices and kernels of some size."""
    kinds = (nn.Linear, nn.Conv2d)
    found = [n for n, layer in model.named_modules() if isinstance(layer, kinds)]
    return [name for name in found if min(model.get_submodule(name).weight.shape[:2]) > 10]


def by_peft(case: Case, *, loha: bool) -> nn.Module:
    """Put PEFT's adapters on the layers, away from their zero start."""
    model = case.build()
    common = {"r": case.rank, "target_modules": adapted_layers(model), "init_lora_weights": False}
    if loha:
        del common["init_lora_weights"]
        config = LoHaConfig(**common, init_weights=False, use_effective_conv2d=True)
        return get_peft_model(model, config)
    return get_peft_model(model, LoraConfig(**common))


def by_plugin(case: Case, method: str, **options: object) -> nn.Module:
    """Convert the same layers to the residual form, away from the zero start."""
    model = case.build()
    names = tuple(adapted_layers(model))
    fedpara.convert(
        model, method=method, base="frozen", rank=case.rank, include=names, trainable="none",
        min_size=0, **options,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    return model


def step_of(model: nn.Module, inputs: Tensor) -> Step:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    labels = torch.arange(inputs.shape[0]) % 10

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    return step


def trained_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def cases() -> Iterator[Case]:
    """Yield a transformer and a CNN, with few and with many inputs."""
    yield Case("transformer 256x4, 8 x 64", lambda: Encoder(256, 4), torch.randn(8, 64, 256), 8, 9)
    yield Case(
        "transformer 768x2, 4 x 128", lambda: Encoder(768, 2), torch.randn(4, 128, 768), 8, 5
    )
    yield Case("resnet18, 4 x 64x64", resnet18, torch.randn(4, 3, 64, 64), 8, 7)


def measure(case: Case, scale: int) -> None:
    pairs = {
        "LoRA": (by_peft(case, loha=False), {"lowrank": by_plugin(case, "lowrank")}),
        "LoHa": (
            by_peft(case, loha=True),
            {
                "fedpara": by_plugin(case, "fedpara"),
                "pfedpara (no bound)": by_plugin(case, "pfedpara"),
                "lowrank, train=right (no bound)": by_plugin(case, "lowrank", train="right"),
            },
        ),
    }
    for peer, (theirs, ours) in pairs.items():
        models = {f"PEFT {peer}": theirs, **ours}
        steps = {name: step_of(model, case.inputs) for name, model in models.items()}
        times = ratios(steps, case.rounds * scale)
        peaks = {name: peak_memory(step) for name, step in steps.items()}
        first = next(iter(steps))
        head = f"{case.name}: {first} {times[first].seconds * 1e3:.0f} ms"
        count = trained_parameters(theirs)
        print(f"{head}, peak {peaks[first] / 1e6:.1f} MB, {count:,} trained")
        for name in ours:
            peak = peaks[name] / peaks[first]
            held = "" if "no bound" in name else _held(times[name].median, peak)
            count = trained_parameters(models[name])
            print(f"    {name}: time {times[name]}, peak {peak:.3f}, {count:,} trained{held}")


def _held(time: float, peak: float) -> str:
    return "" if time <= TIME and peak <= PEAK else "  <-- beyond the bound"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--scale", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, one thread")
    for case in cases():
        if not args.only or any(word in case.name for word in args.only):
            measure(case, args.scale)


if __name__ == "__main__":
    main()
