"""Tensors that the user keeps private by name: heads (FedPer), norms (FedBN), or any others.

The option ``private`` lists patterns of full names, such as ``head.*`` or ``*.norm*``. A tensor
whose name matches never enters a message. A client that has no value for it, or lost it, starts
from what its own model holds (`fedpara_plugins.models.private_start`). Where no model is at hand,
a value that every side derives alike stands in: torch's default for the layer, drawn from the
config's seed.
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
from fedpara_plugins.layers.base import full_name
from fedpara_plugins.plugins import layers
from fedpara_plugins.stages.dtypes import STREAM_DTYPES
from fedpara_plugins.support.torch_seams import own_buffers, own_parameters

__all__ = ["PrivateTensor", "matches", "private_tensors"]


@dataclass(frozen=True)
class PrivateTensor:
    """A tensor that stays on the device, and its initial value.

    Attributes:
        shape: the tensor's shape.
        dtype: its name in torch, such as ``float32``.
        fill: the value of all entries, if ``std`` is 0.
        std: standard deviation of normal entries with mean 0.
        onto: full name of the dense model's tensor, of the same shape, that it is added to; "" if
            it is a tensor of the dense model itself.
    """

    shape: tuple[int, ...]
    dtype: str
    fill: float = 0.0
    std: float = 0.0
    onto: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return prod(self.shape) * dtype.itemsize

    @property
    def drawn_bytes(self) -> int:
        """Size in bytes of what `initial_value` needs besides the result."""
        narrow = self.std and self.dtype != "float32"
        return 4 * prod(self.shape) if narrow else 0

    def initial_value(self, *, seed: int, key: str) -> Tensor:
        """Return the initial value: the same on every device with this seed and full name."""
        dtype = getattr(torch, self.dtype)
        if self.std:
            return seeded_normal(self.shape, std=self.std, seed=seed, key=key).to(dtype)
        # One value is converted, and then copied: a float32 tensor may take more than the result.
        return (
            torch.full((), self.fill)
            .to(dtype)
            .expand(self.shape)
            .clone(memory_format=torch.contiguous_format)
        )

    def to_row(self) -> list[Any]:
        """Return plain values for JSON."""
        row = [list(self.shape), self.dtype, self.fill, self.std]
        return [*row, self.onto] if self.onto else row

    @classmethod
    def from_row(cls, row: list[Any]) -> PrivateTensor:
        """Return the tensor that `to_row` described.

        Raises:
            ValueError: the row is malformed, or torch has no such dtype.
        """
        shape, dtype, fill, std, *rest = row
        (onto,) = rest or ("",)
        if getattr(torch, str(dtype), None) not in STREAM_DTYPES.values():
            raise ValueError(f"unknown dtype {str(dtype)[:40]!r}")
        if not all(type(size) is int and 0 <= size < 2**40 for size in shape):
            raise ValueError(f"no tensor can have shape {str(shape)[:60]}")
        if not (math.isfinite(float(fill)) and math.isfinite(float(std))):
            raise ValueError("a first value is not finite")
        return cls(tuple(shape), str(dtype), float(fill), float(std), str(onto))


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Return whether a full name of the state (``head.weight``) matches a pattern."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def private_tensors(
    model: nn.Module, patterns: tuple[str, ...], *, factors: frozenset[str] = frozenset()
) -> dict[str, PrivateTensor]:
    """Return the tensors of a model's state that the patterns keep private, by full name.

    Args:
        model: converted or not.
        patterns: the option ``private``.
        factors: names of factors, which only the method makes private or shared.

    Raises:
        ConfigError: a pattern matches no name of the state, nothing is left to share, or a tensor
            is tied to a shared one and would travel under that name.
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
    private = {name for name in state if matches(name, patterns)}
    if len(private) == len(model.state_dict()):
        raise ConfigError(
            f"option 'private': {', '.join(patterns)} keeps the whole state on the device, so "
            f"nothing is left to send; name the parts that are to stay"
        )
    _refuse_tied(model, private)
    return {name: tensor for name, tensor in _described(model) if name in private}


def _refuse_tied(model: nn.Module, private: set[str]) -> None:
    state = model.state_dict(keep_vars=True)
    shared = {name: _memory(tensor) for name, tensor in state.items() if name not in private}
    for name in (name for name in state if name in private):
        start, end = _memory(state[name])
        other = next((n for n, (s, e) in shared.items() if start < e and s < end), None)
        if other is not None:
            raise ConfigError(
                f"option 'private': {name!r} is the same tensor as {other!r}, which "
                f"is shared, so it would travel under that name; keep both or neither"
            )


def _memory(tensor: Any) -> tuple[int, int]:
    """Return where a tensor's memory begins and ends; the object's own place if it has none."""
    plain = type(tensor) in (nn.Parameter, Tensor) and tensor.layout == torch.strided
    if not plain or not tensor.numel() or not tensor.data_ptr():
        return -id(tensor), -id(tensor) + 1
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def _described(model: nn.Module) -> Iterator[tuple[str, PrivateTensor]]:
    for prefix, layer in model.named_modules():
        kind = layers().get(type(layer))
        variances = {s.name: s.variance for s in kind.slots(layer)} if kind is not None else {}
        tensors: Mapping[str, Tensor | None] = {
            **own_parameters(layer),
            **own_buffers(layer),
        }
        for attribute, tensor in tensors.items():
            if tensor is not None:
                described = _describe(attribute, tensor, variances.get(attribute))
                yield full_name(prefix, attribute), described


def _describe(attribute: str, tensor: Tensor, variance: float | None) -> PrivateTensor:
    """Describe a tensor by kind of layer and name, not by values, which sides do not share."""
    shape, dtype = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
    if tensor.ndim >= 2 and tensor.is_floating_point():
        # Without a kind that says otherwise: the default of torch's linear and convolution layers.
        std = (variance if variance is not None else 1 / (3 * max(1, prod(shape[1:])))) ** 0.5
        return PrivateTensor(shape, dtype, std=portable(std))
    # Vectors called weight are the scales of norms, in torch and elsewhere.
    ones = attribute in ("weight", "running_var")
    return PrivateTensor(shape, dtype, fill=1.0 if ones else 0.0)
