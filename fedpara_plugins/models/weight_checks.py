"""Checks of layers and weights that cannot be factorised; each error names the remedy.

Without them a conversion would fail halfway with an error of torch's, or would replace a weight
that only looks like an ordinary parameter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.support.torch_seams import (
    is_quantised,
    own_buffers,
    own_parameters,
    trains_for_quantisation,
    weight_hooks,
)
from fedpara_plugins.support.values import has_values, infinite, nonfinite

__all__ = [
    "check_model",
    "holds_nan",
    "refuse_unusable_layer",
    "refuse_unusable_weight",
    "refuse_without_values",
    "spread_of",
    "why_no_kind",
]

_REMOVERS = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm",
}
"""The functions that undo torch's older wrappers, which compute a weight in a hook."""


def check_model(model: Any) -> None:
    """Raise ConversionError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        what = "the class" if isinstance(model, type) else f"a {type(model).__name__}"
        hint = f"call it: {model.__name__}()" if isinstance(model, type) else "give the model"
        raise ConversionError(f"model: expected a torch.nn.Module, got {what}; {hint}")


def holds_nan(tensor: Tensor) -> bool:
    """Return whether a tensor holds NaN. Infinities do not count: masks hold them."""
    return has_values(tensor) and bool((nonfinite(tensor) & ~infinite(tensor)).any())


def spread_of(weight: Tensor) -> float | None:
    """Return the root mean square of a weight's entries; None if it has no values to ask for."""
    if not _is_plain(weight) or not weight.numel():
        return None
    value = weight.detach()
    largest = float(value.abs().max())  # squares of tiny and huge values leave float32
    if largest == 0:
        return 0.0
    return largest * float((value / largest).double().square().mean().sqrt())


def refuse_without_values(name: str, attribute: str, weight: Tensor) -> None:
    """Raise if factors are to be fitted to a weight on the meta device.

    Args:
        name: the layer's name.
        attribute: the layer's attribute, such as ``weight``.
        weight: the value of the attribute.

    Raises:
        ConversionError: the message names layer and attribute, and the remedy.
    """
    if weight.is_meta:
        raise ConversionError(
            f"{_layer(name)}: {attribute} is on the meta device and has no values, which "
            f"init='fit' needs: build the model on a real device and load its weights before "
            f"converting, or use init='random'"
        )


def why_no_kind(layer: nn.Module, kinds: Iterable[type[nn.Module]]) -> str:
    """Return the report's reason for a layer that no kind is registered for."""
    name = type(layer).__name__
    if isinstance(layer, parametrize.ParametrizationList):
        return "it holds the original weight of a parametrised layer"
    if trains_for_quantisation(layer):
        return f"{name} trains for quantisation: convert the float model, then prepare it"
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is scripted: convert the model first, then trace it (torch.jit.trace)"
    own = [p for p in own_parameters(layer).values() if p is not None and p.dim() >= 2]
    packed = [p for p in own if not p.is_floating_point()]
    if packed and any(isinstance(layer, kind) for kind in kinds):
        return (
            f"{name} holds a quantised weight ({type(packed[0]).__name__} of {packed[0].dtype}): "
            f"adapt it with PEFT, whose adapter the codec sends, or convert the float model"
        )
    if own and not any(isinstance(layer, kind) for kind in kinds):
        return f"no factorised kind is registered for {name}"
    return f"{name} is no kind of layer that can be factorised"


def refuse_unusable_layer(name: str, layer: nn.Module, kinds: Iterable[type[nn.Module]]) -> None:
    """Raise if a layer is lazy, quantised, parametrised or holds values that cannot be meant.

    NaN never can; infinities can in biases and masks, and not in a matrix that is factorised.

    Args:
        name: the layer's name in the model.
        layer: one that neither include nor exclude leaves out.
        kinds: the dense classes that can be factorised.

    Raises:
        ConversionError: the message names the layer, what was found, and the remedy.
    """
    if is_quantised(layer):
        raise ConversionError(
            f"{_layer(name)} is quantised ({type(layer).__name__}): convert the float model and "
            f"quantise what to_dense() or fedpara export gives, or exclude the layer"
        )
    of_a_kind = any(isinstance(layer, kind) for kind in kinds)
    if of_a_kind and parametrize.is_parametrized(layer):
        names = ", ".join(layer.parametrizations)  # type: ignore[arg-type]
        raise ConversionError(
            f"{_layer(name)} is parametrised by torch.nn.utils.parametrize (its {names}): remove "
            f"that first (torch.nn.utils.parametrize.remove_parametrizations), or exclude the layer"
        )
    if of_a_kind:
        _refuse_hooked(name, layer)
    for attribute, parameter in own_parameters(layer).items():
        if parameter is not None:
            _refuse_values(name, attribute, parameter, of_a_kind=of_a_kind)
    for attribute, buffer in own_buffers(layer).items():
        if buffer is not None and holds_nan(buffer):
            raise ConversionError(_not_finite(name, attribute))


def refuse_unusable_weight(name: str, attribute: str, weight: Tensor | None) -> None:
    """Raise unless a weight is an ordinary dense floating-point parameter.

    Args:
        name: the layer's name.
        attribute: the layer's attribute, such as ``weight``.
        weight: the value of the attribute.

    Raises:
        ConversionError: the message names layer and attribute, what was found, and the remedy.
    """
    if weight is None:
        raise ConversionError(
            f"{_layer(name)} has no parameter {attribute!r}: it was removed, or is a buffer or an "
            f"attribute now. Make it a parameter again, or exclude the layer"
        )
    found = ""
    if type(weight) not in (nn.Parameter, Tensor):
        found = f"a {type(weight).__name__}, which may be quantised or sharded"
    elif weight.layout != torch.strided:
        found = f"stored as {weight.layout}"
    elif not weight.is_floating_point() or weight.element_size() < 2:
        found = f"of {weight.dtype}"
    if found:
        raise ConversionError(
            f"{_layer(name)}: {attribute} is {found}; expected an ordinary dense floating-point "
            f"parameter of at least 16 bits. Convert before changing it, or exclude the layer"
        )


def _refuse_hooked(name: str, layer: nn.Module) -> None:
    for module, kind in weight_hooks(layer):
        remover = _REMOVERS.get(kind, "torch.nn.utils.prune.remove")
        raise ConversionError(
            f"{_layer(name)} computes its weight in a hook ({module}, {kind}): "
            f"undo that first ({remover}), or exclude the layer"
        )


def _refuse_values(name: str, attribute: str, parameter: Tensor, *, of_a_kind: bool) -> None:
    """Raise for a lazy parameter, for NaN, and for infinities where they cannot belong."""
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ConversionError(
            f"{_layer(name)} is lazy, its {attribute} has no shape yet: run one forward pass "
            f"with sample data before converting"
        )
    if type(parameter) not in (nn.Parameter, Tensor):
        return  # a quantised or sharded one cannot be asked; as a weight it is refused by its name
    matrix = of_a_kind and parameter.dim() >= 2
    if holds_nan(parameter) or (matrix and not _is_finite(parameter)):
        raise ConversionError(_not_finite(name, attribute))


def _layer(name: str) -> str:
    return f"layer {name!r}" if name else "the model (a single layer)"


def _is_plain(tensor: Tensor) -> bool:
    """Return whether torch can check the values: dense, floating, of more than one byte."""
    wide = tensor.is_floating_point() and tensor.element_size() >= 2
    return wide and tensor.layout == torch.strided and not tensor.is_meta


def _is_finite(tensor: Tensor) -> bool:
    return not has_values(tensor) or not bool(nonfinite(tensor).any())


def _not_finite(name: str, attribute: str) -> str:
    return (
        f"{_layer(name)}: {attribute} holds NaN or infinite values; load sound weights before "
        f"converting, or exclude the layer"
    )
