"""Checks for optimizers that were built before a model was converted, and do not train it."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.optim import Optimizer

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.base import full_name

__all__ = ["check_optimizer", "warn_of_earlier_optimizer"]


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Raise if the optimizer still holds dense weights that the conversion has replaced.

    An optimizer may hold a part of the model on purpose. It is refused only if it holds tensors
    from outside the model, and no factor at all of some factorised weight.

    Args:
        model: a converted model; any other model passes.
        optimizer: the optimizer that is to train it.

    Raises:
        ConversionError: the message names the weights that the optimizer would not train.
    """
    held = _held_by(optimizer)
    foreign = held - {id(parameter) for parameter in model.parameters()}
    missing = [name for name, factors in _factors(model) if not held & set(factors)]
    if foreign and missing:
        raise ConversionError(
            f"the optimizer was built before the model was converted: {len(foreign)} of its "
            f"{len(held)} parameters are not the model's, and it holds no factor of "
            f"{_listed(missing)}. Build it after convert(), from model.parameters()."
        )


def warn_of_earlier_optimizer(replaced: Mapping[str, weakref.ref[Tensor]]) -> None:
    """Warn if a living optimizer holds a weight that a conversion has just replaced.

    Usually nobody holds the old weights, they have been freed, and this costs nothing. Optimizers
    are searched for only if some weights are still alive.

    Args:
        replaced: weak references to the dense weights by name; strong ones would keep them alive.
    """
    found = _held_by_optimizers(replaced)
    if found:
        gc.collect()  # unreachable optimizers are no reason to warn
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
    held = {key for optimizer in _optimizers_alive() for key in _held_by(optimizer)}
    return [name for key, name in alive.items() if key in held]


def _optimizers_alive() -> list[Optimizer]:
    """Return all optimizers of the process: the instances of its classes of optimizers.

    Not by `gc.get_objects`: it returns tuples too that other threads are still building, which
    fails there if somebody holds them.
    """
    classes: list[type[Optimizer]] = [Optimizer]
    for known in classes:
        classes += [one for one in known.__subclasses__() if one not in classes]
    # Not isinstance(): it asks objects for __class__, which some proxies answer with an error.
    return [one for one in gc.get_referrers(*classes) if issubclass(type(one), Optimizer)]


def _held_by(optimizer: Optimizer) -> set[int]:
    groups = getattr(optimizer, "param_groups", [])
    return {id(parameter) for group in groups for parameter in group["params"]}


def _factors(model: nn.Module) -> Iterator[tuple[str, list[int]]]:
    """Yield name and ids of the trainable factors of every factorised weight that has any."""
    for name, layer in model.named_modules():
        if not isinstance(layer, FactorisedLayer):
            continue
        for weight in layer.plans:
            factors = [f for f in layer.factors(weight).values() if f.requires_grad]
            if factors:
                yield full_name(name, weight), [id(f) for f in factors]


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
