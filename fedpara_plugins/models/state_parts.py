"""Parts of a model's state, under the names that an app gives to them.

An app may exchange any part of a state, and not always under the model's own names:

- some of the names, such as those of parameters that are trained;
- the state of a module inside of the model, ``model.head.state_dict()``, without its prefix;
- an adapter of PEFT, whose functions leave the adapter's name out of each name
  (``lora_A.default.weight`` is sent as ``lora_A.weight``).

Which part a record is follows from names and shapes alone, so that both sides find the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from fedpara_plugins.errors import MismatchError
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers.base import full_name
from fedpara_plugins.models.private import PrivateTensor
from fedpara_plugins.models.spec import ModelSpec

__all__ = ["Shapes", "StatePart", "find_part", "part_of", "possible_names", "shapes_of"]

TRAINED_COPY = "modules_to_save"
"""Component under which PEFT keeps the copies of whole modules that it trains; left out too."""

Shapes = Mapping[str, "tuple[int, ...] | None"]
"""Shapes by full name; None where one is not known, which then fits any."""


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of tensors by name."""
    return {name: tuple(value.shape) for name, value in tensors.items()}


@dataclass(frozen=True)
class StatePart:
    """A part of a model's state.

    Attributes:
        spec: of the part, with the record's names in the record's order.
        names: the model's own name of each of them.
    """

    spec: ModelSpec
    names: Mapping[str, str]


def find_part(models: Iterable[tuple[ModelSpec, Shapes]], record: Shapes) -> StatePart | None:
    """Return the part of a model that a record is; None if none fits, or several do.

    Args:
        models: their specs, and the shapes of their states as far as they are known.
        record: names and shapes of the record's tensors, in order.

    Raises:
        MismatchError: the record holds a private factor and not all factors of its weight.
    """
    found: dict[tuple[str, ...], StatePart] = {}
    for spec, shapes in models:
        for named in possible_names(spec, shapes, record):
            own = tuple(named.values())
            if own not in found:
                found[own] = StatePart(part_of(spec, named), named)
            if own == tuple(record):
                return found[own]  # these very names are a part, whatever else they may be
    return next(iter(found.values())) if len(found) == 1 else None


def possible_names(spec: ModelSpec, shapes: Shapes, record: Shapes) -> Iterator[dict[str, str]]:
    """Yield each way to read a record's names as names of a model's state.

    If they are names of the state already, there is no other way.

    Args:
        spec: of the model.
        shapes: of its state, as far as they are known.
        record: names and shapes of the record's tensors.

    Yields:
        The model's own name, by the record's.
    """
    keys = dict.fromkeys(spec.keys)
    if not record:
        return
    if all(name in keys for name in record):
        yield {name: name for name in record}
        return
    known = dict(shapes) | dict(spec.shared_shapes())
    inside = [named for named in _inside(keys, record) if _fits(named, known, record)]
    whole = [named for named in inside if len(named) == _size_of_module(keys, named)]
    yield from whole if len(whole) == 1 else inside
    seen = []
    for named in _without_component(keys, record):
        if named not in seen and _fits(named, known, record):
            seen.append(named)
            yield named


def _inside(keys: Mapping[str, None], record: Shapes) -> Iterator[dict[str, str]]:
    """Yield the readings as the state of a module inside of the model."""
    first = f".{next(iter(record))}"
    for key in keys:
        if key.endswith(first):
            prefix = key[: -len(first)]
            named = {name: f"{prefix}.{name}" for name in record}
            if all(name in keys for name in named.values()):
                yield named


def _size_of_module(keys: Mapping[str, None], named: Mapping[str, str]) -> int:
    """Return the number of names that the state of the module has of which these are."""
    name, key = next(iter(named.items()))
    prefix = key[: len(key) - len(name)]
    return sum(other.startswith(prefix) for other in keys)


def _without_component(keys: Mapping[str, None], record: Shapes) -> Iterator[dict[str, str]]:
    """Yield the readings as names of which PEFT left out the adapter's name, the same in all."""
    parts = {key: [part for part in key.split(".") if part != TRAINED_COPY] for key in keys}
    first = next(name for name in record if name not in keys).split(".")
    adapters = {_left_out(longer, first) for longer in parts.values()} - {""}
    for adapter in sorted(adapters):
        shorter: dict[str, str | None] = {}
        for key, longer in parts.items():
            if adapter in longer:
                place = longer.index(adapter)
                short = ".".join(longer[:place] + longer[place + 1 :])
                shorter[short] = None if short in shorter else key
        named = {name: name if name in keys else shorter.get(name) for name in record}
        complete = {name: key for name, key in named.items() if key is not None}
        if len(set(complete.values())) == len(record):
            yield complete


def _left_out(long: list[str], short: list[str]) -> str:
    """Return the component that a list of them has more than another; "" if it is not one."""
    if len(long) != len(short) + 1:
        return ""
    place = next((i for i, part in enumerate(short) if part != long[i]), len(short))
    found = long[place]
    return found if place and long[place + 1 :] == short[place:] and not found.isdecimal() else ""


def _fits(named: Mapping[str, str], known: Shapes, record: Shapes) -> bool:
    return all(
        None in (record[name], known.get(key)) or record[name] == known[key]
        for name, key in named.items()
    )


def part_of(spec: ModelSpec, names: Mapping[str, str]) -> ModelSpec:
    """Return the spec of a part of a model's state, under other names.

    A weight whose shared factors are all in the part is factorised there too. The factors of
    others are ordinary tensors.

    Args:
        spec: of the model.
        names: the model's names of the part, by those of the record, in the record's order.

    Raises:
        MismatchError: the part holds a private factor and not all factors of its weight.
    """
    renamed = {key: name for name, key in names.items()}
    weights: dict[str, WeightPlan] = {}
    for weight, plan in spec.weights.items():
        keys = spec.factor_keys(weight)
        shared = [key for factor, key in keys.items() if factor not in plan.private_names]
        if all(key in renamed for key in shared):
            path = renamed[shared[0]].rpartition(".")[0]
            weights[full_name(path, weight.rpartition(".")[2])] = plan
        elif held := [key for key in keys.values() if key in renamed and key not in shared]:
            missing = next(key for key in shared if key not in renamed)
            raise MismatchError(
                f"fedpara: the arrays hold {held[0]!r} and not {missing!r}, both factors of "
                f"{weight!r}: send all factors of a weight or none, or leave the layer dense "
                f"(option exclude)"
            )
    own = {
        renamed[key]: _moved(tensor, key, renamed[key])
        for key, tensor in spec.own.items()
        if key in renamed
    }
    held_values = {renamed[key]: value for key, value in spec.held.items() if key in renamed}
    return replace(spec, weights=weights, keys=tuple(names), own=own, held=held_values)


def _moved(tensor: PrivateTensor, key: str, name: str) -> PrivateTensor:
    """Return a private tensor of a layer that has another path."""
    if not tensor.onto or key == name:
        return tensor
    path, attribute = name.rpartition(".")[0], tensor.onto.rpartition(".")[2]
    return replace(tensor, onto=full_name(path, attribute))
