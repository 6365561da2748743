"""The residual form of a model as an adapter of the library PEFT.

A sum of products is a LoRA adapter, ``W0 + (alpha / r) B A``; FedPara's product of two is a LoHa
adapter, ``W0 + (alpha / r) (w1_a w1_b) * (w2_a w2_b)``. Factors are written as they are: ``alpha``
carries the scale, of each layer by itself. What else the model trains is saved as whole modules
(``modules_to_save``) where PEFT can tell them from others by name, and by its own name elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.factors.compose import (
    combine_fedpara,
    combine_lowrank,
    combine_sum,
    core_product,
)
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.base import full_name, own_keys
from fedpara_plugins.models.peft_files import MODEL_PREFIX, PeftAdapter, write_adapter
from fedpara_plugins.models.spec import ModelSpec

__all__ = ["LOHA", "LORA", "peft_adapter", "save_peft"]

LORA, LOHA = "LORA", "LOHA"
WORDS = {LORA: "LoRA", LOHA: "LoHa"}

TYPES: Mapping[Callable[..., Any], str] = {
    combine_lowrank: LORA,
    combine_sum: LORA,
    combine_fedpara: LOHA,
}
"""The adapter that has an update combined in this way."""

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS: Mapping[str, tuple[type[nn.Module], ...]] = {
    LORA: (nn.Linear, nn.Embedding, *CONVOLUTIONS),
    LOHA: (nn.Linear, nn.Conv1d, nn.Conv2d),
}
"""Layers that PEFT adapts. LoRA adapts the ``Conv1D`` of transformers as well."""


@dataclass(frozen=True)
class _AdaptedLayer:
    """A layer's part of an adapter: its tensors by their names in PEFT's layer."""

    name: str
    kind: str
    rank: int
    alpha: float
    tensors: Mapping[str, Tensor]
    effective: bool | None = None
    """Whether a kernel has a core (LoHa); None for a layer that could have none."""
    inputs_first: bool = False


def save_peft(
    model: nn.Module,
    folder: Path | str,
    *,
    base_model: str | None = None,
    private: bool = False,
) -> PeftAdapter:
    """Write a model in the residual form as an adapter for ``PeftModel.from_pretrained``.

    Args:
        model: converted with ``base="frozen"``.
        folder: made if it is missing.
        base_model: name or path of the pretrained model, for ``base_model_name_or_path``.
        private: whether a client's private update and its other private tensors are a part of it.
            Its owner alone may read the files then.

    Returns:
        What was written.

    Raises:
        ConversionError: PEFT has no such adapter; the message names the layer and the reason.
        OSError: the disk refuses.
    """
    adapter = peft_adapter(model, base_model=base_model, private=private)
    write_adapter(adapter, folder, owner_only=private and bool(ModelSpec.of(model).private_keys))
    return adapter


def peft_adapter(
    model: nn.Module, *, base_model: str | None = None, private: bool = False
) -> PeftAdapter:
    """Return the adapter that `save_peft` writes."""
    layers = [
        _adapted(name, layer, private)
        for name, layer in model.named_modules()
        if isinstance(layer, FactorisedLayer) and layer.plans
    ]
    if not layers:
        raise ConversionError(
            "the model has no factorised layer, of which PEFT could have adapters"
        )
    kinds = {layer.kind: layer.name for layer in layers}
    if len(kinds) > 1:
        raise ConversionError(
            f"layer {kinds[LORA]!r} is a LoRA adapter and {kinds[LOHA]!r} a LoHa one; a folder of "
            f"PEFT holds one kind. Use one method for all layers"
        )
    (kind,) = kinds
    tensors = {
        f"{MODEL_PREFIX}{layer.name}.{key}": value
        for layer in layers
        for key, value in layer.tensors.items()
    }
    adapted = [layer.name for layer in layers]
    beside = dict(_trained_beside(model, private))
    saved = _saved_modules(model, beside.keys(), adapted)
    biases = {f"{name}.bias" for name in adapted} & beside.keys()
    for key, value in beside.items():
        path, _, name = key.rpartition(".")
        place = f"{path}.base_layer.{name}" if path in adapted else key
        tensors[f"{MODEL_PREFIX}{place}"] = value
    config = _common_config(layers, [name for name, _ in model.named_modules()])
    config |= {
        "peft_type": kind,
        "base_model_name_or_path": base_model,
        "task_type": None,
        "inference_mode": True,
        "modules_to_save": saved or None,
    }
    if kind == LORA:
        fan_in_fan_out = any(layer.inputs_first for layer in layers)
        config |= {"bias": "all" if biases else "none", "fan_in_fan_out": fan_in_fan_out}
    else:
        effective = {layer.effective: layer.name for layer in layers if layer.effective is not None}
        if len(effective) > 1:
            raise ConversionError(
                f"the kernel of {effective[True]!r} has a core and that of {effective[False]!r} "
                f"none; a LoHa adapter has the same for all (use_effective_conv2d). Set the option "
                f"core for all layers alike"
            )
        config["use_effective_conv2d"] = True in effective
    return PeftAdapter(config, tensors)


# Layers


def _adapted(name: str, layer: FactorisedLayer, private: bool) -> _AdaptedLayer:
    if (weight := next((w for w in layer.plans if w != "weight"), None)) is not None:
        why = f"PEFT adapts no single weight of a layer of this kind ({layer.kind})"
        raise _refused(full_name(name, weight), why)
    if not name:
        raise _refused("(model)", "PEFT adapts layers of a model, and this model is a single layer")
    plan = layer.plans["weight"]
    if not plan.residual:
        raise _refused(
            name,
            "its factors are the weight itself, and an adapter is an update of a frozen one: "
            "convert with base='frozen', or export a dense model",
        )
    kind = TYPES.get(plan.method.combine)
    if kind is None or plan.tanh:
        how = "tanh around its operands" if plan.tanh else f"method {plan.method.name!r}"
        raise _refused(name, f"PEFT has no adapter with {how}")
    inputs_first = kind == LORA and _is_transformers_conv1d(layer)
    if layer.dense_class not in KINDS[kind] and not inputs_first:
        raise _refused(name, f"PEFT's {WORDS[kind]} adapts no layer of this kind ({layer.kind})")
    factors = {n: f.detach() for n, f in layer.factors("weight").items()}
    if kind == LOHA:
        return _loha(name, layer, plan, factors)
    return _lora(name, layer, plan, factors, inputs_first=inputs_first, private=private)


def _refused(name: str, why: str) -> ConversionError:
    return ConversionError(f"layer {name!r}: {why}")


def _is_transformers_conv1d(layer: FactorisedLayer) -> bool:
    kind = layer.dense_class
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _lora(
    name: str,
    layer: FactorisedLayer,
    plan: WeightPlan,
    factors: Mapping[str, Tensor],
    *,
    inputs_first: bool,
    private: bool,
) -> _AdaptedLayer:
    """Return A (r, in ...) and B (out, r), of one operand or of all side by side."""
    shared = [i for i in range(plan.method.operands) if i not in plan.method.private]
    operands = list(range(plan.method.operands)) if private else shared
    rows, columns = [], []
    for i in operands:
        x, y, t = (factors.get(f"{letter}{i + 1}") for letter in "xyt")
        assert x is not None
        assert y is not None
        # Several operands have scales of their own, which one alpha cannot carry.
        columns.append(x if len(operands) == 1 else x * (plan.gains[i] * plan.outer))
        rows.append(y.T if t is None else core_product(y, t))
    a, b = torch.cat(rows), torch.cat(columns, dim=1)  # (r, in k1 ...), (out, r)
    rank = len(a)
    alpha = plan.gains[operands[0]] * plan.outer * rank if len(operands) == 1 else float(rank)
    if inputs_first:
        a, b = b.T, a.T
    if isinstance(layer, nn.Embedding):
        tensors = {"lora_embedding_A": b.T, "lora_embedding_B": a.T}
    elif isinstance(layer, CONVOLUTIONS):
        _check_convolution(name, layer)
        points = (1,) * len(plan.shape[2:])
        filters = a.reshape(rank, *plan.shape[1:])
        tensors = {"lora_A.weight": filters, "lora_B.weight": b.reshape(*b.shape, *points)}
    else:
        tensors = {"lora_A.weight": a, "lora_B.weight": b}
    return _AdaptedLayer(name, LORA, rank, alpha, tensors, inputs_first=inputs_first)


def _check_convolution(name: str, layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
    """Raise for what PEFT's LoRA of a convolution leaves out of its own convolution."""
    for attribute, plain in (("groups", 1), ("padding_mode", "zeros")):
        if (value := getattr(layer, attribute)) != plain:
            raise _refused(name, f"PEFT's LoRA computes another update with {attribute}={value!r}")
    if any(step != 1 for step in layer.dilation):
        raise _refused(name, f"PEFT's LoRA ignores dilation={layer.dilation}")


def _loha(
    name: str, layer: FactorisedLayer, plan: WeightPlan, factors: Mapping[str, Tensor]
) -> _AdaptedLayer:
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        raise _refused(name, "PEFT's LoHa computes another update with its padding_mode")
    tensors: dict[str, Tensor] = {}
    points = prod(plan.shape[2:])  # of a kernel; PEFT takes one of 1x1 for a matrix
    for i in (1, 2):
        x, y, t = factors[f"x{i}"], factors[f"y{i}"], factors.get(f"t{i}")
        if t is not None and points == 1:
            x, t = x @ t.flatten(1), None
        if t is None:
            tensors |= {f"hada_w{i}_a": x, f"hada_w{i}_b": y.T}
        else:
            core = t.unsqueeze(-1) if t.dim() == 3 else t  # (r, r, k1, k2)
            tensors |= {f"hada_w{i}_a": x.T, f"hada_w{i}_b": y.T, f"hada_t{i}": core}
    alpha = plan.outer * prod(plan.gains) * plan.rank
    effective = plan.kernel if points > 1 else None
    return _AdaptedLayer(name, LOHA, plan.rank, alpha, tensors, effective)


def _common_config(layers: list[_AdaptedLayer], names: list[str]) -> dict[str, Any]:
    """Return ranks and scales: the most frequent ones, and those of other layers by pattern."""
    rank = Counter(layer.rank for layer in layers).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers).most_common(1)[0][0]
    adapted = [layer.name for layer in layers]
    alone = all(not _others_ending(name, names, adapted) for name in adapted)
    exact = f"(?:{'|'.join(re.escape(name) for name in adapted)})"
    return {
        "r": rank,
        "lora_alpha" if layers[0].kind == LORA else "alpha": alpha,
        "rank_pattern": {_exactly(y.name): y.rank for y in layers if y.rank != rank},
        "alpha_pattern": {_exactly(y.name): y.alpha for y in layers if y.alpha != alpha},
        "target_modules": adapted if alone else exact,
    }


def _exactly(name: str) -> str:
    return f"^{re.escape(name)}"


def _others_ending(name: str, names: list[str], same: list[str]) -> bool:
    """Return whether PEFT, which compares the ends of names, would take others for this one."""
    return any(other.endswith(f".{name}") and other not in same for other in names)


# What is trained beside


def _trained_beside(model: nn.Module, private: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that training changes and that are no factors, by name in the state."""
    left_out = frozenset() if private else ModelSpec.of(model).private_keys
    for path, module in model.named_modules():
        plans = module.plans.values() if isinstance(module, FactorisedLayer) else ()
        own = {key for plan in plans for key in own_keys(plan)}
        trained = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
        values: dict[str, Tensor] = {n: p for n, p in trained.items() if n not in own}
        buffers = dict(module.named_buffers(recurse=False))
        if "running_mean" in buffers:  # of a norm: they follow the data, whatever is trained
            values |= buffers
        for name, value in values.items():
            if (key := full_name(path, name)) not in left_out:
                yield key, value.detach()


def _saved_modules(model: nn.Module, beside: Set[str], adapted: list[str]) -> list[str]:
    """Return the modules that PEFT can save as a whole.

    PEFT finds them by the ends of their names, and takes no adapter inside of them. Other tensors
    keep their own names, under which PEFT loads them into the model itself.

    Args:
        model: converted.
        beside: names of what `_trained_beside` yields.
        adapted: names of the adapted layers.
    """
    names = [name for name, _ in model.named_modules()]
    saved: list[str] = []
    for path in sorted({key.rpartition(".")[0] for key in beside}):
        module = model.get_submodule(path)
        whole = {full_name(path, name) for name in module.state_dict()}
        around = re.compile(rf"(^|.*\.){path}($|\..*)")
        if (
            whole <= beside
            and not isinstance(module, CONTAINERS)
            and not any(other != path and other.endswith(path) for other in names)
            and not any(map(around.match, [*adapted, *saved]))
            and not any(path.startswith(f"{other}.") for other in saved)
        ):
            saved.append(path)
    return saved
