"""`fedpara export`: from factors in a file to the dense model, or to an adapter of PEFT."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.models.agreed_plans import adopt_plans, agreed_config
from fedpara_plugins.models.checkpoint_files import Checkpoint, factor_shapes
from fedpara_plugins.models.checkpoints import check_same_shapes
from fedpara_plugins.models.conversion import convert
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.support.units import readable_bytes
from fedpara_plugins.support.values import has_values, infinite, nonfinite

__all__ = ["adapter_from", "dense_from"]

FACTORS = frozenset({"x1", "y1", "x2", "y2", "t1", "t2"})


def dense_from(
    found: Checkpoint, model: nn.Module | None = None, config: FedParaConfig | None = None
) -> tuple[dict[str, Tensor], ModelSpec]:
    """Return the dense state that a checkpoint of factors stands for.

    Args:
        found: what `read_checkpoint` returned.
        model: the unconverted model. It is converted if ``config`` is given or the file does not
            describe its model; otherwise the result is only checked against it. None is enough if
            the file describes its model.
        config: options of the conversion, which must agree with the file's.

    Returns:
        The dense state in the model's order, and the spec of the converted model. If the file has
        no private factors, the state is W1.

    Raises:
        ConfigError: neither the file nor the arguments say how the model was converted.
        MismatchError: the file is of another model or was trained with other options; the message
            names the first tensor that differs, and both shapes.
        PayloadError: the weights hold NaN or infinity, or would not fit this machine's memory.
    """
    if found.about.get("format") == "dense":
        raise PayloadError("the file holds a dense model already: there is nothing to export")
    spec = found.spec
    if spec is None or config is not None:
        if model is None or config is None:
            raise ConfigError(_without_description(found.tensors))
        spec = _spec_for(found, model, config)
    elif model is not None:
        composed = {weight: torch.Size(plan.shape) for weight, plan in spec.weights.items()}
        factors = factor_shapes(spec)
        rest = {k: v.shape for k, v in found.tensors.items() if k not in factors}
        check_same_shapes({**rest, **composed}, model.state_dict(), there="the unconverted model")
    size, memory = spec.dense_bytes(found.tensors), _memory()
    if memory is not None and size > memory:  # small factors can describe a weight of any size
        raise PayloadError(
            f"the dense model would take {readable_bytes(size)}, this machine has "
            f"{readable_bytes(memory)} of memory: export it on a larger one, or the file is forged"
        )
    dense = spec.dense_state(found.tensors)
    for name, value in dense.items():
        _check_values(name, value, composed=name in spec.weights)
    return dense, spec


def _without_description(tensors: Mapping[str, Tensor]) -> str:
    """Return what to do about a file that does not describe its model.

    Such a file comes of an app's own ``torch.save(state_dict)``.
    """
    layers: dict[str, set[str]] = {}
    for name in tensors:
        path, _, factor = name.rpartition(".")
        if factor in FACTORS:
            layers.setdefault(path, set()).add(factor)
    found = {path: factors for path, factors in layers.items() if {"x1", "y1"} <= factors}
    if not found:
        what = f"none of its {len(tensors)} tensors is named as a factor: it may be dense already"
    else:
        path, factors = next(iter(found.items()))
        methods = "fedpara or pfedpara" if "x2" in factors else "lowrank, or of W1 alone"
        what = f"it holds factors of {len(found)} layers ({path!r}, for example), of {methods}"
    return (
        f"the file does not describe its model; {what}. Give the model's factory, and method and "
        f"gamma (or other options) as in training (--model my_app.task:Net --method fedpara "
        f"--gamma 0.1); or save the dense state in the app: fedpara.to_dense(state)"
    )


def _check_values(name: str, value: Tensor, *, composed: bool) -> None:
    """Raise for NaN, and for infinities in a composed weight; in a mask they may be meant."""
    if not has_values(value):
        return
    bad = nonfinite(value)
    if not composed:
        bad &= ~infinite(value)
    if bad.any():
        raise PayloadError(
            f"{name!r} holds NaN or infinite values: training has diverged. Export an earlier "
            f"checkpoint"
        )


def _memory() -> int | None:
    """Return the bytes of this machine's memory; None if the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _spec_for(found: Checkpoint, model: nn.Module, config: FedParaConfig) -> ModelSpec:
    converted = _converted(found, model, config)
    spec = ModelSpec.of(converted)
    check_same_shapes(found.tensors, converted.state_dict(), optional=spec.private_keys)
    return spec


def _converted(found: Checkpoint, model: nn.Module, config: FedParaConfig) -> nn.Module:
    """Convert the model as that of the file was, and compare the two."""
    # The file's factors replace the weights, so there is no point in fitting factors to them.
    specs = [] if found.spec is None else [found.spec]
    converted = convert(model, agreed_config(config, specs))
    if found.spec is not None:
        adopt_plans(converted, found.spec)
        spec = ModelSpec.of(converted)
        found.spec.check_equal(spec, here="the file", there="the model with the options given")
    return converted


def adapter_from(
    found: Checkpoint, model: nn.Module, config: FedParaConfig | None = None
) -> tuple[nn.Module, list[str]]:
    """Return the converted model that a checkpoint in the residual form stands for.

    Args:
        found: what `read_checkpoint` returned.
        model: the unconverted model; it is converted in place.
        config: options of the conversion; None takes those of the file.

    Returns:
        The model with the file's tensors, for `fedpara_plugins.models.save_peft`, and the names of
        frozen weights W0 that differ from the model's: the adapter belongs to those of the file.

    Raises:
        ConfigError: neither the file nor the arguments say how the model was converted.
        MismatchError: the file is of another model or was trained with other options.
    """
    config = config or found.config
    if config is None:
        raise ConfigError(
            "the file does not describe its model: give method and rank (or other options) as in "
            "training"
        )
    converted = _converted(found, model, config)
    spec, state = ModelSpec.of(converted), converted.state_dict()
    check_same_shapes(found.tensors, state, optional=spec.private_keys)
    own = {weight: state[key].clone() for weight, key in spec.base_keys.items()}
    converted.load_state_dict({**state, **found.tensors}, strict=True)
    bases = {w: found.tensors.get(key) for w, key in spec.base_keys.items()}
    other = [w for w, base in bases.items() if base is not None and not torch.equal(base, own[w])]
    return converted, other
