"""Small things that several stages need."""

from __future__ import annotations

from collections.abc import Container

__all__ = ["free_name", "is_shape"]


def free_name(name: str, taken: Container[str]) -> str:
    """``name``, followed by as many ``'`` as it takes to be none of those that are taken."""
    while name in taken:
        name += "'"
    return name


def is_shape(shape: object) -> bool:
    """Whether it is a list of integers of at least 0."""
    # bool is an int to isinstance, not to the wire.
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
