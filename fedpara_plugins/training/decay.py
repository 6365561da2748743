"""Weight decay that shrinks a composed weight as it would shrink a dense one.

An optimizer that decays each of F factors by (1 - lr wd) shrinks their product by (1 - lr wd)^F,
about F times as fast as the user asked for. While a step lasts, factors therefore stand in
parameter groups of their own, whose ``weight_decay`` is a share of the user's. Gradients and
parameters are not touched, so a step that a scaler skips changes nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["join_groups", "split_groups"]

Group = dict[str, Any]

OWN = ("params", "param_names", "weight_decay")
"""What a part of a group has for itself."""

DECOUPLED = tuple(
    getattr(torch.optim, name)
    for name in ("AdamW", "Adafactor", "Muon")
    if hasattr(torch.optim, name)  # older versions of torch lack some
)
"""Optimizers that multiply the parameter itself by 1 - lr * weight_decay."""


class _Split:
    """The user's parameter groups while a step has others in their place."""

    def __init__(self) -> None:
        self.groups: list[Group] | None = None
        self.parts: dict[int, list[Group]] = {}

    def parts_of(self, group: Group, by_count: Mapping[int, list[Tensor]]) -> list[Group]:
        """Return a group for each number of factors; the same objects in each step."""
        parts = self.parts.get(id(group), [])
        if [_ids(part["params"]) for part in parts] != [_ids(own) for own in by_count.values()]:
            parts = self.parts[id(group)] = [{"params": own} for own in by_count.values()]
        return parts


def _ids(things: Iterable[object]) -> list[int]:
    return [id(thing) for thing in things]


_splits: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Split] = weakref.WeakKeyDictionary()


def split_groups(optimizer: torch.optim.Optimizer, counts: Mapping[int, int]) -> None:
    """Give factors a share of their group's weight decay, until `join_groups`.

    Args:
        optimizer: any that takes its decay from ``weight_decay`` in its parameter groups.
        counts: for each factor, by id, the number of factors that shrink together.
    """
    split = _splits.setdefault(optimizer, _Split())
    if split.groups is not None:
        return  # a second gradient of the same step
    groups: list[Group] = []
    for group in optimizer.param_groups:
        decay = float(group.get("weight_decay") or 0.0)
        by_count: dict[int, list[Tensor]] = {}
        for parameter in group["params"] if decay else ():
            by_count.setdefault(counts.get(id(parameter), 1), []).append(parameter)
        if not by_count.keys() - {1}:
            groups.append(group)
            continue
        parts = split.parts_of(group, by_count)
        for count, part in zip(by_count, parts, strict=True):
            share = _share(optimizer, group, decay, count)
            given = group if part is parts[0] else _with_own_tensors(group)
            part.update({**given, "params": part["params"], "weight_decay": share})
        groups += parts
    if _ids(groups) != _ids(optimizer.param_groups):
        split.groups = optimizer.param_groups
        optimizer.param_groups = groups


def _with_own_tensors(group: Group) -> Group:
    """Copy the tensors that an optimizer notes in a group: all parts would add to the same one.

    LAMB counts its steps so.
    """
    return {
        key: value.clone() if isinstance(value, Tensor) and key != "lr" else value
        for key, value in group.items()
    }


def join_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer its own groups back, with what the step has noted in them."""
    split = _splits.get(optimizer)
    if split is None or split.groups is None:
        return
    present = {id(group): group for group in optimizer.param_groups}
    for group in split.groups:
        for part in reversed(split.parts.get(id(group), [])):
            if present.pop(id(part), None) is not None:
                group.update({k: v for k, v in part.items() if k not in OWN})
        present.pop(id(group), None)
    optimizer.param_groups = split.groups
    optimizer.param_groups += present.values()  # groups that a closure has added
    split.groups = None


def _share(
    optimizer: torch.optim.Optimizer, group: Mapping[str, Any], decay: float, count: int
) -> float:
    if count == 1 or not (isinstance(optimizer, DECOUPLED) or group.get("decoupled_weight_decay")):
        return decay / count
    lr = float(group["lr"])
    shrink = 1 - lr * decay
    return (1 - shrink ** (1 / count)) / lr if lr and shrink > 0 else decay / count
