"""Find optimizers that were built before a model was converted, and so train nothing of it."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.layers import FactorisedLayer

__all__ = ["check_optimizer", "warn_of_earlier_optimizer"]


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise if the optimizer still holds dense weights that conversion has replaced.

    An optimizer that holds a part of the model on purpose passes: only one that holds tensors from
    outside the model, and of some factorised weight no factor at all, is refused.

    Args:
        model: a converted model; of any other model nothing is said.
        optimizer: the one that is to train it.

    Raises:
        ConversionError: names the weights that the optimizer would not train.
    """
    held = _held_by(optimizer)
    strangers = held - {id(parameter) for parameter in model.parameters()}
    missing = [name for name, factors in _factors(model) if not held & set(factors)]
    if strangers and missing:
        raise ConversionError(
            f"the optimizer was built before the model was converted: {len(strangers)} of its "
            f"{len(held)} parameters are not the model's, and it holds no factor of "
            f"{_listed(missing)}. Build it after convert(), from model.parameters()."
        )


def warn_of_earlier_optimizer(replaced: Mapping[str, weakref.ref[Tensor]]) -> None:
    """Warn if an optimizer is alive that holds a weight which a conversion has just replaced.

    Costs nothing in the ordinary case: nobody holds the old weights any more, and they are gone.
    Only where some are alive are the interpreter's objects searched for optimizers.

    Args:
        replaced: the dense weights by name, weakly: this must not keep them alive itself.
    """
    found = _held_by_optimizers(replaced)
    if found:
        gc.collect()  # an optimizer that nobody can reach any more is no reason to warn
        found = _held_by_optimizers(replaced)
    if found:
        warnings.warn(
            f"an optimizer was built before the model was converted and still holds the dense "
            f"{_listed(found)}: it would not train the factors. Build it after convert(), from "
            f"model.parameters().",
            stacklevel=3,
        )


def _held_by_optimizers(replaced: Mapping[str, weakref.ref[Tensor]]) -> list[str]:
    alive = {id(weight): name for name, ref in replaced.items() if (weight := ref()) is not None}
    if not alive:
        return []
    # type(), not isinstance(): the latter asks objects for __class__, which proxies answer oddly.
    optimizers = [thing for thing in gc.get_objects() if issubclass(type(thing), Optimizer)]
    held = {key for optimizer in optimizers for key in _held_by(optimizer)}
    return [name for key, name in alive.items() if key in held]


def _held_by(optimizer: Optimizer) -> set[int]:
    groups = getattr(optimizer, "param_groups", [])
    return {id(parameter) for group in groups for parameter in group["params"]}


def _factors(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Ids of the trainable factors of every factorised weight that has any."""
    for name, layer in model.named_modules():
        if not isinstance(layer, FactorisedLayer):
            continue
        for weight in layer.plans:
            factors = [f for f in layer.factors(weight).values() if f.requires_grad]
            if factors:
                yield f"{name}.{weight}" if name else weight, [id(f) for f in factors]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
