"""A dense copy of a converted model."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.models.attached_config import CONFIG_ATTRIBUTE
from fedpara_plugins.models.surgery import copy_model, replace_layers
from fedpara_plugins.models.weight_checks import check_model, holds_nan
from fedpara_plugins.support.torch_seams import own_parameters

__all__ = ["to_dense"]

M = TypeVar("M", bound=nn.Module)


def to_dense(model: M) -> M:
    """Return a dense copy of a converted model; the unconverted model loads its state strictly.

    The copy shares no tensor with ``model``, which stays as it is. For pFedPara it is the model of
    the client that calls; with private factors at zero it is the shared W1.

    Raises:
        ConversionError: a parameter holds NaN, or one of a factorised layer infinity; or ``model``
            is not a module.
    """
    check_model(model)
    dense = copy_model(model)
    dense.__dict__.pop(CONFIG_ATTRIBUTE, None)
    layers_by_id: dict[int, nn.Module] = {}
    for name, layer in dense.named_modules():
        if not isinstance(layer, FactorisedLayer):
            _refuse_nan(name, layer)
            continue
        try:
            layers_by_id[id(layer)] = layer.to_dense()
        except ConversionError as error:
            raise ConversionError(f"layer {name!r}: {error}") from error
    result = layers_by_id.get(id(dense), dense)
    replace_layers(result, layers_by_id)
    return result  # type: ignore[return-value]


def _refuse_nan(name: str, layer: nn.Module) -> None:
    for attribute, parameter in own_parameters(layer).items():
        if parameter is None or isinstance(parameter, nn.parameter.UninitializedParameter):
            continue
        if holds_nan(parameter):
            raise ConversionError(
                f"layer {name!r}: {attribute} holds NaN: the training has diverged. Go back to an "
                f"earlier state, and see the option clip"
            )
