"""Nested values as plain JSON and tensors, for a file that is read without pickle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Others", "pack_plain", "unpack_plain"]

Tensors = dict[str, Tensor]

Others = Callable[[Any], "tuple[str, Any] | None"]
"""Turns a value of another kind into that kind's name and a value that can be packed; None for a
value that it does not know."""

_SCALARS = (bool, int, float, str, type(None))


def pack_plain(value: Any, tensors: Tensors, others: Others = lambda value: None) -> Any:
    """Return a value as plain JSON; arrays and tensors go to ``tensors``.

    Args:
        value: scalars, lists, tuples, dicts, arrays and tensors, nested to any depth.
        tensors: gets the tensors, by new names.
        others: for further kinds.

    Raises:
        TypeError: it is of a kind that cannot be kept.
    """
    if isinstance(value, _SCALARS):
        if isinstance(value, float) and not math.isfinite(value):
            return {"float": repr(value)}
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack_plain(item, tensors, others) for item in value]}
    if (found := others(value)) is not None:
        kind, inner = found
        return {kind: pack_plain(inner, tensors, others)}
    if isinstance(value, dict):
        rows = [
            [pack_plain(k, tensors, others), pack_plain(v, tensors, others)]
            for k, v in value.items()
        ]
        return {"dict": rows}
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        name = str(len(tensors))
        array = np.array(value) if isinstance(value, np.generic) else value
        tensors[name] = torch.as_tensor(array)
        return {_array_kind(value): name}
    raise TypeError(f"cannot keep a {type(value).__name__}")


def _array_kind(value: object) -> str:
    if isinstance(value, np.generic):
        return "generic"
    return "ndarray" if isinstance(value, np.ndarray) else "Tensor"


def unpack_plain(
    value: Any, tensors: Mapping[str, Tensor], others: Mapping[str, Callable[[Any], Any]] = {}
) -> Any:
    """Undo `pack_plain`.

    Args:
        value: what it returned.
        tensors: those that it put aside.
        others: by name of a kind, what makes it again.

    Raises:
        KeyError, TypeError, ValueError: not such a value.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind in ("list", "tuple"):
        items = [unpack_plain(item, tensors, others) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {
            unpack_plain(k, tensors, others): unpack_plain(v, tensors, others) for k, v in content
        }
    if kind in others:
        return others[kind](unpack_plain(content, tensors, others))
    tensor = tensors[content]
    if kind == "Tensor":
        return tensor
    return tensor.numpy()[()] if kind == "generic" else tensor.numpy()
