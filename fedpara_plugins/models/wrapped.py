"""Wrappers, hooks and replaced forwards, which refer to a dense layer or weight itself.

A conversion replaces a layer by a new one with new parameters. A wrapper, a function in place of
``forward`` or a hook on a tensor would silently keep the old ones. Such a model is refused, such a
layer stays dense, and the user is warned of such hooks.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.support.torch_seams import has_hooks

__all__ = ["lost_hooks", "refuse_wrapped", "why_forward_replaced", "why_frozen"]


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if `DistributedDataParallel` already holds the dense weights.

    Raises:
        ConversionError: the message names the wrapper and the remedy.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.parallel.DistributedDataParallel):
            where = f"layer {name!r}" if name else "the model"
            raise ConversionError(
                f"{where} is wrapped in DistributedDataParallel, which would wait for gradients of "
                f"the dense weights: convert the model first, then wrap it"
            )


def why_forward_replaced(layer: nn.Module) -> str:
    """Return why a layer with a replaced forward stays dense (for the report), or ""."""
    if "forward" in layer.__dict__:
        return (
            "its forward was replaced on this very object (by hooks of accelerate, say), and the "
            "replacement would go on with the dense weight; convert the model first"
        )
    return ""


def why_frozen(weight: Tensor | None) -> str:
    """Return why a frozen weight stays dense (for the report); "" if it is trained.

    Whether factors would start fresh or fitted makes no difference, since the sides of a run may
    differ in that: only the side that a run starts from fits.
    """
    if weight is None or weight.requires_grad:
        return ""
    return (
        "frozen (requires_grad=False): no training would bring back what factors lose; "
        "base='frozen' keeps it and trains factors of an update; to freeze factors, freeze them "
        "after converting"
    )


def lost_hooks(weights: Mapping[str, Tensor]) -> list[str]:
    """Return the names of weights with hooks on the tensor, which a composed weight does not have.

    Args:
        weights: the dense weights that are replaced, by full name.
    """
    return [name for name, weight in weights.items() if has_hooks(weight)]
