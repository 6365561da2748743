"""What hangs on a dense layer or weight itself, and would not follow it into factors.

A conversion puts a new layer with new parameters in the old one's place. Who holds the old ones
(a wrapper, a function in place of ``forward``, a hook on a tensor) would go on with them in
silence; here it is refused, left dense or said.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from fedpara_plugins.errors import ConversionError

__all__ = ["refuse_wrapped", "warn_of_weight_hooks", "why_bound", "why_frozen"]


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if `DistributedDataParallel` already watches the dense weights.

    Raises:
        ConversionError: it names the wrapper and the remedy.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, nn.parallel.DistributedDataParallel):
            where = f"layer {name!r}" if name else "the model"
            raise ConversionError(
                f"{where} is wrapped in DistributedDataParallel, which would wait for gradients of "
                f"the dense weights: convert the model first, then wrap it"
            )


def why_bound(layer: nn.Module) -> str:
    """Why a layer must stay as it is, a clause for the report; "" if nothing is against it."""
    if "forward" in layer.__dict__:
        return (
            "its forward was replaced on this very object (by hooks of accelerate, say), and the "
            "replacement would go on with the dense weight; convert the model first"
        )
    return ""


def why_frozen(weight: Tensor | None, init: str | None) -> str:
    """Why a weight that is not trained must stay as it is; "" if it is trained, or fitted."""
    if weight is None or weight.requires_grad or init == "fit":
        return ""
    return (
        "frozen (requires_grad=False): no training would bring back what fresh factors lose; "
        "freeze after converting, or use init='fit'"
    )


def warn_of_weight_hooks(weights: Mapping[str, Tensor]) -> None:
    """Warn of hooks on tensors (`Tensor.register_hook` and its kin) that are about to be lost.

    Args:
        weights: the dense weights that are replaced, by full name.
    """
    lost = [
        name
        for name, weight in weights.items()
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None)
    ]
    if lost:
        warnings.warn(
            f"hooks were registered on {', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''} "
            f"before the model was converted; a composed weight does not have them. Register them "
            f"on the factors, after convert().",
            stacklevel=3,
        )
