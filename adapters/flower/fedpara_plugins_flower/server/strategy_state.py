"""A strategy's own state as plain JSON and tensors, without knowing the strategy.

Moments, momentum, clipping norms, round counters: whatever Flower's strategies and users' own keep
in attributes. A strategy with ``state_dict()`` and ``load_state_dict()`` says itself what is to be
kept, as torch's optimizers do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.common import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedpara_plugins.exchange import pack_plain, unpack_plain

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
    return pack_plain(value, tensors, _flowers_own)


def _flowers_own(value: Any) -> tuple[str, Any] | None:
    if isinstance(value, ArrayRecord):
        return "ArrayRecord", [[name, array] for name, array in value.items()]
    if isinstance(value, Array):
        return "Array", value.numpy()
    return None


def unpack(value: Any, tensors: Tensors) -> Any:
    """Undo `pack`."""
    return unpack_plain(value, tensors, {"Array": Array, "ArrayRecord": _record})


def _record(rows: list[list[Any]]) -> ArrayRecord:
    return ArrayRecord(dict(map(tuple, rows)))
