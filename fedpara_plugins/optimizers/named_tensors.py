"""The parameters that have variates or duals, and arithmetic on named tensors."""

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
    "add_scaled",
    "check_fit",
    "copied",
    "copy_into",
    "finite",
    "norm",
    "subtract",
    "trained_parameters",
    "zeros",
]

State: TypeAlias = dict[str, Tensor]
"""Named tensors; the names are those of the model's state."""


def trained_parameters(
    model: nn.Module, exchanged: Collection[str] | None = None
) -> dict[str, nn.Parameter]:
    """Return by name the parameters that have variates and duals: the trained, shared ones.

    Private names have none, since the server never sees them. Buffers (BatchNorm's) have none,
    since they have no gradient. Tied parameters appear under their first name.

    Args:
        model: of a client or the server.
        exchanged: names that travel; None for the whole state.
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
    """Copy tensors, without gradients, on their devices."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def zeros(like: Mapping[str, Tensor]) -> State:
    """Return zeros of the same names, shapes, dtypes and devices."""
    return {name: torch.zeros_like(value, requires_grad=False) for name, value in like.items()}


def subtract(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> State:
    """Return ``after - before`` for the names of ``before``; 0 where both are one infinity."""
    return {name: _difference(after[name], value) for name, value in before.items()}


def _difference(after: Tensor, before: Tensor) -> Tensor:
    change = (after - before).detach()
    if change.is_floating_point() and not bool(torch.isfinite(change).all()):
        change.masked_fill_(after == before, 0.0)
    return change


def add_scaled(start: Mapping[str, Tensor], by: Mapping[str, Tensor], factor: float) -> State:
    """Return ``start + factor * by`` for the names of ``start``."""
    return {name: value + factor * by[name] for name, value in start.items()}


@torch.no_grad()
def copy_into(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters, in place."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the Euclidean norm over all entries of all tensors, summed in float64."""
    squares = [float(value.detach().double().square().sum()) for value in tensors]
    return math.sqrt(sum(squares))


def finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no entry is NaN or infinite."""
    return all(bool(torch.isfinite(value).all()) for value in tensors if value.is_floating_point())


def check_fit(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor], *, what: str) -> None:
    """Raise unless both have the same names and shapes.

    Args:
        tensors: the tensors to check.
        like: tensors of the expected names and shapes.
        what: what the tensors are, for the error's text.

    Raises:
        MismatchError: names and shapes differ; the text names the first difference.
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
            f"{what}: {extra[0]!r} is not a shared parameter that is trained here ({len(extra)} "
            f"such names); both sides must train the same shared parameters, frozen ones included"
        )
