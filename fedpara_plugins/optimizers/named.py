"""Which tensors of a model an optimizer's own state is about, and arithmetic on named tensors."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import MismatchError
from fedpara_plugins.models.spec import ModelSpec

__all__ = [
    "State",
    "check_fit",
    "copied",
    "difference",
    "finite",
    "moved",
    "norm",
    "put_back",
    "trained_parameters",
    "zeros",
]

State: TypeAlias = dict[str, Tensor]
"""Named tensors; the names are those of the model's state."""


def trained_parameters(
    model: nn.Module, exchanged: Collection[str] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters that have variates and duals, by name: those that are trained and shared.

    Private names have none, since the server never sees them, and buffers (BatchNorm's) have no
    gradient. Of tied parameters the first name counts.

    Args:
        model: of a client or the server.
        exchanged: names that travel; None for the whole of the state.
    """
    private = ModelSpec.of(model).private_keys
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.is_floating_point()
        and name not in private
        and (exchanged is None or name in exchanged)
    }


def copied(tensors: Mapping[str, Tensor]) -> State:
    """Copies without a gradient, where the tensors live."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def zeros(like: Mapping[str, Tensor]) -> State:
    """Zeros of the same names, shapes, dtypes and devices."""
    return {name: torch.zeros_like(value, requires_grad=False) for name, value in like.items()}


def difference(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> State:
    """``after - before``, for the names of ``before``."""
    return {name: (after[name] - value).detach() for name, value in before.items()}


def moved(start: Mapping[str, Tensor], by: Mapping[str, Tensor], factor: float = 1.0) -> State:
    """``start + factor * by``, for the names of ``start``."""
    return {name: value + factor * by[name] for name, value in start.items()}


@torch.no_grad()
def put_back(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into parameters, in place."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def norm(tensors: Iterable[Tensor]) -> float:
    """Euclidean norm over all entries of all tensors, summed in float64."""
    squares = [float(value.detach().double().square().sum()) for value in tensors]
    return math.sqrt(sum(squares))


def finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(value).all()) for value in tensors if value.is_floating_point())


def check_fit(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], *, what: str) -> None:
    """Raise unless both have the same names and shapes.

    Args:
        tensors: to be checked.
        like: that they must fit.
        what: they are, for the message.

    Raises:
        MismatchError: names the first difference.
    """
    for name, value in like.items():
        if name not in tensors or tensors[name].shape != value.shape:
            found = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise MismatchError(
                f"{what}: expected {name!r} of shape {tuple(value.shape)}, found {found}; both "
                f"sides must train the same shared parameters, frozen ones included"
            )
    if extra := [name for name in tensors if name not in like]:
        raise MismatchError(
            f"{what}: {extra[0]!r} is no shared parameter that is trained here ({len(extra)} such "
            f"names); both sides must train the same shared parameters, frozen ones included"
        )
