"""Replacement of layers wherever a model keeps them, and copies of models in use."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from fedpara_plugins.support.torch_seams import MODULE_ATTRIBUTES, own_children

__all__ = ["copy_model", "replace_layers"]

M = TypeVar("M", bound=nn.Module)


def replace_layers(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Replace layers in every place of a model.

    Plain lists, tuples and dictionaries among a module's attributes count as well, since a forward
    may take its layers from there.

    Args:
        model: none of the layers to be replaced.
        new: the new layers by the id of the old one, which must be alive.
    """
    for module in list(model.modules()):
        for name, child in list(own_children(module).items()):
            if id(child) in new:
                setattr(module, name, new[id(child)])
        for name, value in _user_attributes(module):
            module.__dict__[name] = _replaced(value, new, set())


def copy_model(model: M) -> M:
    """Return a deep copy; results of the last forward that the model holds are detached."""
    memo = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for _, value in _user_attributes(module)
        for tensor in _tensors(value, set())
        if not tensor.is_leaf
    }
    return copy.deepcopy(model, memo)


def _user_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Return the attributes that are neither torch's nor parameters, buffers or submodules."""
    attributes = list(vars(module).items())
    return ((name, value) for name, value in attributes if name not in MODULE_ATTRIBUTES)


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
