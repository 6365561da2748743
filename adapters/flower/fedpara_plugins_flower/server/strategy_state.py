"""The state of any strategy as plain JSON and tensors.

It consists of what strategies keep in attributes: moments, momentum, clipping norms, round
counters. A strategy with ``state_dict()`` and ``load_state_dict()`` decides itself what is saved,
as torch's optimizers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedpara_plugins.exchange import pack_plain, unpack_plain
from fedpara_plugins_flower.seams import strategy_attributes

__all__ = ["capture", "pack", "restore", "unpack"]

Tensors = dict[str, Tensor]

_SCALARS = (bool, int, float, str, type(None))


def capture(strategy: Strategy, tensors: Tensors) -> tuple[dict[str, Any], list[str]]:
    """Return the state of a strategy.

    Args:
        strategy: any.
        tensors: receives the tensors, under new names.

    Returns:
        Plain JSON for `restore`, and the names of attributes that cannot be saved.
    """
    if hasattr(strategy, "state_dict") and hasattr(strategy, "load_state_dict"):
        try:
            return {"own": pack(strategy.state_dict(), tensors)}, []
        except TypeError as error:
            return {"attributes": {}}, [f"state_dict() ({error})"]
    kept: dict[str, Any] = {}
    lost: list[str] = []
    for name, value in strategy_attributes(strategy).items():
        if isinstance(value, Strategy):  # a wrapper's inner strategy
            inner, more = capture(value, tensors)
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
    """Restore the state that `capture` returned, in a new strategy.

    Args:
        strategy: of the same class.
        kept: the state.
        first: the state before the first round. A setting that the user has changed since (a
            learning rate, say) keeps its present value.
        tensors: those of ``kept``.
    """
    if "own" in kept:
        strategy.load_state_dict(unpack(kept["own"], tensors))  # type: ignore[attr-defined]
        return
    now = strategy_attributes(strategy)
    for name, entry in kept["attributes"].items():
        before = first.get("attributes", {}).get(name, {})
        if "strategy" in entry:
            restore(now[name], entry["strategy"], before.get("strategy", {}), tensors)
        elif not _changed_by_user(now.get(name), before.get("value")):
            setattr(strategy, name, unpack(entry["value"], tensors))


def _changed_by_user(now: object, before: object) -> bool:
    return isinstance(now, _SCALARS) and now is not None and now != before


def pack(value: Any, tensors: Tensors) -> Any:
    """Return a value as plain JSON; its arrays go to ``tensors``.

    Raises:
        TypeError: if a value of this type cannot be saved.
    """
    return pack_plain(value, tensors, _pack_record)


def _pack_record(value: Any) -> tuple[str, Any] | None:
    if isinstance(value, ArrayRecord):
        return "ArrayRecord", [[name, array] for name, array in value.items()]
    if isinstance(value, Array):
        return "Array", value.numpy()
    return None


def unpack(value: Any, tensors: Tensors) -> Any:
    """Undo `pack`."""
    return unpack_plain(value, tensors, {"Array": Array, "ArrayRecord": _unpack_record})


def _unpack_record(rows: list[list[Any]]) -> ArrayRecord:
    return ArrayRecord(dict(map(tuple, rows)))
