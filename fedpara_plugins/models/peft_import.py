"""An adapter of the library PEFT as a model in the residual form."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConversionError, MismatchError, PayloadError
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.models.conversion import convert
from fedpara_plugins.models.layer_decisions import decide_layers
from fedpara_plugins.models.peft_export import LOHA, LORA
from fedpara_plugins.models.peft_files import MODEL_PREFIX, PeftAdapter, read_adapter

__all__ = ["convert_peft"]

METHODS = {LORA: "lowrank", LOHA: "fedpara"}
PARTS = {
    LORA: re.compile(r"(.*)\.(lora_[AB])\.weight|(.*)\.(lora_embedding_[AB])"),
    LOHA: re.compile(r"(.*)\.(hada_(?:w[12]_[ab]|t[12]))"),
}
"""Names of an adapter's tensors: the layer, and the part of its update."""

REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA scales the columns of W0 + update to lengths of their own, which no such "
    "update can follow",
    "use_qalora": "QA-LoRA pools the inputs of the update",
    "lora_bias": "it has a bias in lora_B",
    "target_parameters": "it adapts parameters that are no weights of a layer (target_parameters)",
    "trainable_token_indices": "it trains single rows of an embedding (trainable_token_indices)",
    "layer_replication": "it repeats layers of the model (layer_replication)",
    "alora_invocation_tokens": "its update depends on the tokens (aLoRA)",
    "use_bdlora": "its factors are in blocks (BD-LoRA)",
    "megatron_config": "its layers are Megatron's",
}
"""Settings of an adapter that is not of the form W0 + s X Yᵀ, and why."""

REMEDY = (
    "Merge it into the model (PEFT's merge_and_unload), or federate the PEFT model as it is, with "
    "method='none' and a codec"
)


@dataclass(frozen=True)
class _Update:
    """A layer's update: tensors by part, and its scale."""

    name: str
    tensors: Mapping[str, Tensor]
    rank: int
    scale: float

    @property
    def core(self) -> bool:
        """Whether a kernel has a core."""
        return "hada_t1" in self.tensors


def convert_peft(
    model: nn.Module, folder: Path | str, config: FedParaConfig | None = None, **options: Any
) -> nn.Module:
    """Convert a model in place to the residual form, with the factors of an adapter of PEFT.

    A LoRA adapter becomes method ``lowrank``, a LoHa adapter ``fedpara``. Its layers keep their
    ranks, the weights W0 stay frozen, and what the adapter saves as whole modules is loaded and
    trained. The outputs are those of ``PeftModel.from_pretrained(model, folder)``.

    Args:
        model: the model that the adapter was made for, unconverted.
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        config: other options. Those that the adapter decides are replaced: method, base, include,
            exclude, overrides, min_size, and trainable unless it is given.
        options: fields of `FedParaConfig`, instead of ``config``.

    Returns:
        The model.

    Raises:
        ConversionError: the adapter is of another kind; the message says why.
        MismatchError: it was made for another model.
        PayloadError: a file is missing or damaged.
    """
    adapter = read_adapter(folder)
    kind = _kind_of(adapter)
    updates, rest = _parts_of(adapter, kind)
    _check_names(model, updates, rest, folder)
    config = config or FedParaConfig(**options)
    parameters = [name for name, _ in model.named_parameters()]
    trained = tuple(_literally(name) for name in parameters if name in rest)
    config = _config_for(config, kind, updates, trained)
    _check_layers(model, config, updates)
    _load_rest(model, rest)
    model = convert(model, config)
    for update in updates:
        _load(model.get_submodule(update.name), update, kind)
    return model


def _kind_of(adapter: PeftAdapter) -> str:
    """Return LORA or LOHA, or raise for an adapter that is not of that form."""
    kind = adapter.config.get("peft_type")
    if kind not in METHODS:
        raise ConversionError(
            f"an adapter of PEFT's type {str(kind)[:40]!r} cannot be converted, only LORA and LOHA "
            f"can. {REMEDY}"
        )
    for setting, why in REFUSED.items():
        if adapter.config.get(setting):
            raise ConversionError(f"the adapter cannot be converted: {why}. {REMEDY}")
    start = adapter.config.get("init_lora_weights")
    changes_base = isinstance(start, str) and start.startswith(("pissa", "olora", "loftq", "corda"))
    if changes_base:
        raise ConversionError(
            f"the adapter cannot be converted: init_lora_weights={start!r} has changed the weights "
            f"that it is added to. Save it with PEFT's path_initial_model_for_weight_conversion"
        )
    return str(kind)


def _parts_of(adapter: PeftAdapter, kind: str) -> tuple[list[_Update], dict[str, Tensor]]:
    """Return the layers' updates, and all other tensors by their names in the model."""
    layers: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for key, value in adapter.tensors.items():
        name = key.removeprefix(MODEL_PREFIX)
        found = PARTS[kind].fullmatch(name)
        if found is None:
            rest[name.replace(".base_layer.", ".")] = value
            continue
        layer, part = (group for group in found.groups() if group is not None)
        layers.setdefault(layer, {})[part] = value
    if not layers:
        raise PayloadError(f"the file of the {kind} adapter holds no tensor of it")
    return [_update(adapter, kind, name, parts) for name, parts in layers.items()], rest


def _update(adapter: PeftAdapter, kind: str, name: str, tensors: Mapping[str, Tensor]) -> _Update:
    wanted = {
        *({"lora_A", "lora_B"} if "lora_A" in tensors else set()),
        *({"lora_embedding_A", "lora_embedding_B"} if "lora_embedding_A" in tensors else set()),
        *({f"hada_w{i}_{side}" for i in "12" for side in "ab"} if kind == LOHA else set()),
        *({"hada_t1", "hada_t2"} if "hada_t1" in tensors else set()),
    }
    if tensors.keys() != wanted:
        raise PayloadError(
            f"layer {name!r} of the adapter: expected the tensors {', '.join(sorted(wanted))}, got "
            f"{', '.join(sorted(tensors))}"
        )
    config = adapter.config
    first = tensors.get("hada_w1_b", next(iter(tensors.values())))
    rank = len(tensors.get("lora_A", tensors.get("lora_embedding_A", first)))
    default = config.get("lora_alpha" if kind == LORA else "alpha", 8)
    alpha = float(_by_pattern(config.get("alpha_pattern"), name, default))
    root = kind == LORA and config.get("use_rslora")
    return _Update(name, tensors, rank, alpha / (math.sqrt(rank) if root else rank))


def _by_pattern(patterns: object, name: str, default: Any) -> Any:
    """Return the first value whose pattern is an end of the name, as PEFT does."""
    for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _check_names(
    model: nn.Module, updates: list[_Update], rest: Mapping[str, Tensor], folder: Path | str
) -> None:
    layers, state = dict(model.named_modules()), model.state_dict()
    strange = [update.name for update in updates if update.name not in layers]
    strange += [
        name
        for name, value in rest.items()
        if name not in state or state[name].shape != value.shape
    ]
    if strange:
        raise MismatchError(
            f"{folder}: the adapter was made for another model: this one has no {strange[0]!r} of "
            f"that shape ({len(strange)} such names)"
        )


def _config_for(
    config: FedParaConfig, kind: str, updates: list[_Update], trained: tuple[str, ...]
) -> FedParaConfig:
    layers = {}
    for update in updates:
        layers[_literally(update.name)] = {"rank": update.rank, "core": update.core}
    mapping = config.to_mapping()
    mapping |= {
        "method": METHODS[kind],
        "base": "frozen",
        "include": tuple(layers),
        "exclude": (),
        "overrides": layers,
        "min_size": 0,
        "trainable": mapping.get("trainable", trained or ("none",)),
    }
    return FedParaConfig(**mapping)


def _literally(name: str) -> str:
    """Return a shell-style pattern that matches this name alone."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _check_layers(model: nn.Module, config: FedParaConfig, updates: list[_Update]) -> None:
    """Raise for a layer that the adapter adapts and that would stay dense."""
    decided = {decision.name: decision for decision in decide_layers(model, config)}
    for update in updates:
        decision = decided.get(update.name)
        if decision is None or set(decision.plans) != {"weight"}:
            reasons = decision.reasons.values() if decision else ["it has no weight of its own"]
            raise ConversionError(
                f"layer {update.name!r}: its adapter cannot be converted: {'; '.join(reasons)}. "
                f"{REMEDY}"
            )


def _load_rest(model: nn.Module, rest: Mapping[str, Tensor]) -> None:
    state = model.state_dict()
    with torch.no_grad():
        for name, value in rest.items():
            state[name].copy_(value)


def _load(layer: nn.Module, update: _Update, kind: str) -> None:
    """Write an update into a converted layer's factors."""
    assert isinstance(layer, FactorisedLayer)
    plan = layer.plans["weight"]
    inputs_first = type(layer).__name__ == "FactorisedConv1D"
    values = dict(_factors(update, layer, inputs_first=inputs_first))
    values["x1"] = values["x1"] * (update.scale / (plan.outer * math.prod(plan.gains)))
    factors = layer.factors("weight")
    for name, value in values.items():
        if value.shape != plan.factor_shape(name):
            raise MismatchError(
                f"layer {update.name!r}: the adapter was made for another model: its factor {name} "
                f"is {tuple(value.shape)}, expected {plan.factor_shape(name)}"
            )
    with torch.no_grad():
        for name, value in values.items():
            factors[name].copy_(value)


def _factors(
    update: _Update, layer: nn.Module, *, inputs_first: bool
) -> Iterator[tuple[str, Tensor]]:
    tensors = update.tensors
    if "lora_embedding_A" in tensors:
        yield "x1", tensors["lora_embedding_A"].T
        yield "y1", tensors["lora_embedding_B"]
    elif "lora_A" in tensors:
        a, b = tensors["lora_A"].flatten(1), tensors["lora_B"].flatten(1)  # (r, in ...), (out, r)
        yield "x1", a.T if inputs_first else b
        yield "y1", b if inputs_first else a.T
    else:
        for i in (1, 2):
            a, b = tensors[f"hada_w{i}_a"], tensors[f"hada_w{i}_b"]
            yield f"x{i}", a.T if update.core else a
            yield f"y{i}", b.T
            if update.core:
                core = tensors[f"hada_t{i}"]
                yield f"t{i}", core.squeeze(-1) if isinstance(layer, nn.Conv1d) else core
