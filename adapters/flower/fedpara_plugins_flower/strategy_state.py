"""A strategy's own state as plain JSON and tensors, without knowing the strategy.

Moments, momentum, clipping norms, round counters: whatever Flower's strategies and users' own keep
in attributes. A strategy with ``state_dict()`` and ``load_state_dict()`` says itself what is to be
kept, as torch's optimizers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.common import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

__all__ = ["captured", "pack", "restore", "unpack"]

Tensors = dict[str, Tensor]

_SCALARS = (bool, int, float, str, type(None))


def captured(strategy: Strategy, tensors: Tensors) -> tuple[dict[str, Any], list[str]]:
    """What must be kept of a strategy.

    Args:
        strategy: any.
        tensors: gets the tensors, by new names.

    Returns:
        Plain JSON for `restore`, and the names of attributes that cannot be kept.
    """
    if hasattr(strategy, "state_dict") and hasattr(strategy, "load_state_dict"):
        try:
            return {"own": pack(strategy.state_dict(), tensors)}, []
        except TypeError as error:
            return {"attributes": {}}, [f"state_dict() ({error})"]
    kept: dict[str, Any] = {}
    lost: list[str] = []
    for name, value in vars(strategy).items():
        if isinstance(value, Strategy):  # a wrapper's inner one
            inner, more = captured(value, tensors)
            kept[name] = {"strategy": inner}
            lost += [f"{name}.{other}" for other in more]
        elif not callable(value):
            try:
                kept[name] = {"value": pack(value, tensors)}
            except TypeError:
                lost.append(name)
    return {"attributes": kept}, lost


def restore(
    strategy: Strategy, kept: Mapping[str, Any], first: Mapping[str, Any], tensors: Tensors
) -> None:
    """Undo `captured` on a strategy that was constructed anew.

    Args:
        strategy: of the same class.
        kept: what `captured` returned.
        first: what it returned before the first round; a setting that the user has changed since
            (a learning rate, say) stays as it is now.
        tensors: those of ``kept``.
    """
    if "own" in kept:
        strategy.load_state_dict(unpack(kept["own"], tensors))  # type: ignore[attr-defined]
        return
    now = vars(strategy)
    for name, entry in kept["attributes"].items():
        before = first.get("attributes", {}).get(name, {})
        if "strategy" in entry:
            restore(now[name], entry["strategy"], before.get("strategy", {}), tensors)
        elif not _changed_by_user(now.get(name), before.get("value")):
            setattr(strategy, name, unpack(entry["value"], tensors))


def _changed_by_user(now: object, before: object) -> bool:
    return isinstance(now, _SCALARS) and now is not None and now != before


def pack(value: Any, tensors: Tensors) -> Any:
    """A value as plain JSON; arrays go to ``tensors``.

    Raises:
        TypeError: it is of a kind that cannot be kept.
    """
    if isinstance(value, _SCALARS):
        if isinstance(value, float) and not np.isfinite(value):
            return {"float": repr(value)}
        return value
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack(item, tensors) for item in value]}
    if isinstance(value, ArrayRecord):
        return {"ArrayRecord": [[name, pack(array, tensors)] for name, array in value.items()]}
    if isinstance(value, dict):
        return {"dict": [[pack(k, tensors), pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, Array | np.ndarray | np.generic | torch.Tensor):
        array = value.numpy() if isinstance(value, Array) else value
        name = str(len(tensors))
        tensors[name] = torch.as_tensor(np.array(array) if isinstance(array, np.generic) else array)
        return {_kind(value): name}
    raise TypeError(f"cannot keep a {type(value).__name__}")


def _kind(value: object) -> str:
    kinds = {"Array": Array, "generic": np.generic, "ndarray": np.ndarray}
    return next((name for name, kind in kinds.items() if isinstance(value, kind)), "Tensor")


def unpack(value: Any, tensors: Tensors) -> Any:
    """Undo `pack`."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind in ("list", "tuple"):
        items = [unpack(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    if kind == "dict":
        return {unpack(k, tensors): unpack(v, tensors) for k, v in content}
    if kind == "ArrayRecord":
        return ArrayRecord({name: unpack(array, tensors) for name, array in content})
    tensor = tensors[content]
    if kind == "Tensor":
        return tensor
    array = tensor.numpy()
    return {"Array": Array, "generic": lambda a: a[()], "ndarray": lambda a: a}[kind](array)
