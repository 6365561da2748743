"""State that the user keeps on the device by name: heads (FedPer), norms (FedBN), anything.

The option ``private`` lists patterns of full names, such as ``head.*`` or ``*.norm*``. What matches
never enters a message. A client that has none of it yet, or lost it, starts from values that every
side derives alike: what torch gives the kind of layer, drawn from the config's seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.factors.initialise import seeded_normal
from fedpara_plugins.factors.planning import portable
from fedpara_plugins.plugins import layers

__all__ = ["OwnTensor", "matches", "own_tensors"]


@dataclass(frozen=True)
class OwnTensor:
    """One tensor that stays on the device, and its first value.

    Attributes:
        shape: of the tensor.
        dtype: its name in torch, such as ``float32``.
        fill: the value of all entries, if ``std`` is 0.
        std: standard deviation of normal entries with mean 0.
        onto: full name of the dense model's tensor that it is added to, of the same shape; "" for
            one that stands in the dense model by itself.
    """

    shape: tuple[int, ...]
    dtype: str
    fill: float = 0.0
    std: float = 0.0
    onto: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return prod(self.shape) * dtype.itemsize

    def first(self, *, seed: int, key: str) -> Tensor:
        """The first value, the same on every device with the same seed and name."""
        dtype = getattr(torch, self.dtype)
        if self.std:
            return seeded_normal(self.shape, std=self.std, seed=seed, key=key).to(dtype)
        return torch.full(self.shape, self.fill).to(dtype)

    def to_row(self) -> list[Any]:
        """Plain values for JSON."""
        row = [list(self.shape), self.dtype, self.fill, self.std]
        return [*row, self.onto] if self.onto else row

    @classmethod
    def from_row(cls, row: list[Any]) -> OwnTensor:
        """Undo `to_row`.

        Raises:
            ValueError: not such a row, or a dtype that torch does not have.
        """
        shape, dtype, fill, std, *rest = row
        (onto,) = rest or ("",)
        if not isinstance(getattr(torch, str(dtype), None), torch.dtype):
            raise ValueError(f"unknown dtype {str(dtype)[:40]!r}")
        if not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            raise ValueError(f"no tensor can have shape {str(shape)[:60]}")
        if not (math.isfinite(float(fill)) and math.isfinite(float(std))):
            raise ValueError("a first value is not finite")
        return cls(tuple(shape), str(dtype), float(fill), float(std), str(onto))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a full name of the state (``head.weight``) is among those that the user keeps."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def own_tensors(
    model: nn.Module, patterns: tuple[str, ...], *, factors: frozenset[str] = frozenset()
) -> dict[str, OwnTensor]:
    """The tensors of a model's state that stay on the device, by full name.

    Args:
        model: converted or not.
        patterns: the option ``private``.
        factors: names that are factors, and private or shared by the method's rule alone.

    Raises:
        ConfigError: a pattern matches no name of the state, nothing is left to share, or a tensor
            is tied to one that is shared, under whose name it would travel after all.
    """
    if not patterns:
        return {}
    state = [name for name in model.state_dict() if name not in factors]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in state):
            raise ConfigError(
                f"option 'private': pattern {pattern!r} matches no name of the model's state. "
                f"The model has: {', '.join(state)}"
            )
    kept = {name for name in state if matches(name, patterns)}
    if len(kept) == len(model.state_dict()):
        raise ConfigError(
            f"option 'private': {', '.join(patterns)} keeps the whole state on the device, so "
            f"nothing is left to send; name the parts that are to stay"
        )
    _refuse_tied(model, kept)
    return {name: own for name, own in _described(model) if name in kept}


def _refuse_tied(model: nn.Module, kept: set[str]) -> None:
    shared = {id(t): n for n, t in model.state_dict(keep_vars=True).items() if n not in kept}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in kept and id(tensor) in shared:
            raise ConfigError(
                f"option 'private': {name!r} is the same tensor as {shared[id(tensor)]!r}, which "
                f"is shared, so it would travel under that name; keep both or neither"
            )


def _described(model: nn.Module) -> Iterator[tuple[str, OwnTensor]]:
    for prefix, layer in model.named_modules():
        kind = layers().get(type(layer))
        variances = {s.name: s.variance for s in kind.slots(layer)} if kind is not None else {}
        tensors: Mapping[str, Tensor | None] = {**layer._parameters, **layer._buffers}
        for attribute, tensor in tensors.items():
            if tensor is not None:
                name = f"{prefix}.{attribute}" if prefix else attribute
                yield name, _first_value(attribute, tensor, variances.get(attribute))


def _first_value(attribute: str, tensor: Tensor, variance: float | None) -> OwnTensor:
    """By the kind of layer and the name, never by the values: those may differ between sides."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if tensor.ndim >= 2 and tensor.is_floating_point():
        # What torch's linear and convolution layers have, for kinds that say nothing else.
        std = (variance if variance is not None else 1 / (3 * max(1, prod(shape[1:])))) ** 0.5
        return OwnTensor(shape, dtype, std=portable(std))
    # Vectors called weight are the scales of norms, torch's and everybody else's.
    ones = attribute in ("weight", "running_var")
    return OwnTensor(shape, dtype, fill=1.0 if ones else 0.0)
