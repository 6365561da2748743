"""Small things that several stages need."""

from __future__ import annotations

from collections.abc import Container

from fedpara_plugins.errors import PayloadError

__all__ = ["MAX_DIMENSIONS", "check_dimensions", "free_name", "is_shape"]

MAX_DIMENSIONS = 64
"""Of a tensor, as many as torch computes with. It makes tensors of more, and then takes hours."""


def check_dimensions(name: str, count: int, most: int = MAX_DIMENSIONS) -> None:
    """Refuse a tensor of more dimensions.

    Raises:
        PayloadError: it has.
    """
    if count > most:
        raise PayloadError(f"tensor {name!r} has {count} dimensions, at most {most} can travel")


def free_name(name: str, taken: Container[str]) -> str:
    """``name``, followed by as many ``'`` as it takes to be none of those that are taken."""
    while name in taken:
        name += "'"
    return name


def is_shape(shape: object) -> bool:
    """Whether it is a list of integers of at least 0, at most `MAX_DIMENSIONS` of them."""
    # bool is an int to isinstance, not to the wire.
    return (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in shape)
    )
