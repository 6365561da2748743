"""Layers in the place of others, wherever a model keeps them, and copies of models in use."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

__all__ = ["copy_of", "replace_layers"]

M = TypeVar("M", bound=nn.Module)

_OF_TORCH = frozenset(vars(nn.Module()))


def replace_layers(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put new layers in every place that the old ones have.

    Also in plain lists, tuples and dictionaries among a module's attributes: a forward that takes
    its layers from there would go on with the old ones.

    Args:
        model: itself none of those to be replaced.
        new: by the id of the old layer, which must be alive.
    """
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if id(child) in new:
                setattr(module, name, new[id(child)])
        for name, value in _further_attributes(module):
            module.__dict__[name] = _replaced(value, new, set())


def copy_of(model: M) -> M:
    """A deep copy, also of a model that holds results of its last forward (they are detached)."""
    memo = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for _, value in _further_attributes(module)
        for tensor in _tensors(value, set())
        if not tensor.is_leaf
    }
    return copy.deepcopy(model, memo)


def _further_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What the module's author has put there, beside parameters, buffers and submodules."""
    return ((name, value) for name, value in list(vars(module).items()) if name not in _OF_TORCH)


def _replaced(value: Any, new: Mapping[int, nn.Module], seen: set[int]) -> Any:
    if isinstance(value, nn.Module):
        return new.get(id(value), value)
    if type(value) not in (list, tuple, dict) or id(value) in seen:
        return value
    seen.add(id(value))
    if type(value) is dict:
        value.update({key: _replaced(own, new, seen) for key, own in value.items()})
        return value
    items = [_replaced(own, new, seen) for own in value]
    if all(mine is own for mine, own in zip(items, value, strict=True)):
        return value
    if type(value) is list:
        value[:] = items
        return value
    return tuple(items)


def _tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (list, tuple, dict) and id(value) not in seen:
        seen.add(id(value))
        for own in value.values() if type(value) is dict else value:
            yield from _tensors(own, seen)
