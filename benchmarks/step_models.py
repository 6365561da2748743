"""Models of the training-step benchmark: dense, with factors, and with the peers' adapters."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fedpara_plugins as fedpara
from fedpara_plugins.plugins import FactorisedLayer

__all__ = ["bound", "flower_models", "lycoris_loha", "peft_loha", "ranks", "resnet18"]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(32, out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(32, out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or width != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width, out, 1, stride, bias=False), nn.GroupNorm(32, out)
            )

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(x)).relu()
        return (self.norm2(self.conv2(hidden)) + self.shortcut(x)).relu()


def resnet18(classes: int = 10) -> nn.Sequential:
    """Build the usual ResNet18 (7x7 stem, pooling, widths 64 to 512) with GroupNorm."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.GroupNorm(32, 64), nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    for width, out in pairwise((64, 64, 128, 256, 512)):
        layers += [Block(width, out, 1 if width == out else 2), Block(out, out, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def ranks(model: nn.Module) -> dict[str, int]:
    """Return the ranks by layer name of a converted model's layers with one weight."""
    return {
        name: layer.plans["weight"].rank
        for name, layer in model.named_modules()
        if isinstance(layer, FactorisedLayer) and "weight" in layer.plans
    }


def bound(model: nn.Module, dense: nn.Module, *inputs: Tensor) -> float:
    """Return the arithmetic of a step with composed weights over that of the dense step."""
    with FlopCounterMode(display=False) as counter, _without_onednn():
        output = dense(*inputs)
        (output if isinstance(output, Tensor) else output[0]).sum().backward()
    dense.zero_grad()
    composing = 0
    for layer in model.modules():
        for plan in layer.plans.values() if isinstance(layer, FactorisedLayer) else ():
            kernel = prod(plan.shape[2:])
            (m, n), rank = plan.shape[:2], plan.rank
            inner = m * n * rank + (n * rank * rank if kernel > 1 else 0)
            composing += 3 * 2 * plan.method.operands * inner * kernel
    return 1 + composing / counter.get_total_flops()


@contextmanager
def _without_onednn() -> Iterator[None]:
    """Disable oneDNN: its recurrent layer is one operation, which torch does not count."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about TF32 on another device
        with torch.backends.mkldnn.flags(enabled=False):
            yield


def peft_loha(dense: nn.Module, layers: dict[str, int]) -> nn.Module:
    """Put PEFT's LoHa on these layers, by rank; everything that is no weight trains."""
    from peft import LoHaConfig, get_peft_model

    config = LoHaConfig(
        target_modules=[*layers], rank_pattern={f"^{k}$": v for k, v in layers.items()},
        use_effective_conv2d=True, init_weights=False,
    )  # fmt: skip
    adapted = get_peft_model(copy.deepcopy(dense), config)
    for name, parameter in adapted.named_parameters():
        if "base_layer.weight" not in name:
            parameter.requires_grad_(True)
    return adapted


class Adapted(nn.Module):
    """A network, and the modules that were put into its layers' forward functions."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.adapters = nn.ModuleList()

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.network(*inputs)  # type: ignore[no-any-return]


def lycoris_loha(dense: nn.Module, layers: dict[str, int]) -> nn.Module:
    """Put LyCORIS' LoHa on these layers of the dense model, by rank."""
    from lycoris.modules.loha import LohaModule

    adapted = Adapted(copy.deepcopy(dense))
    for name, rank in layers.items():
        layer = adapted.network.get_submodule(name)
        own = LohaModule(name, layer, lora_dim=rank, alpha=rank, use_tucker=True)
        own.apply_to()
        layer.get_parameter("weight").requires_grad_(False)
        adapted.adapters.append(own)
    return adapted


def flower_models(path: Path) -> ModuleType:
    """Import ``models.py`` of Flower's baseline ``fedpara`` from a user's own copy of it."""
    spec = importlib.util.spec_from_file_location("flower_baseline_models", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def factorised(dense: nn.Module, **options: object) -> nn.Module:
    """Return a copy of the dense model with FedPara's factors."""
    return fedpara.convert(copy.deepcopy(dense), **{"method": "fedpara", **options})
