"""The contract of a codec stage, and the checks that every stage needs.

A stage is a pair of pure functions. A new stage takes one file with one subclass of `Stage`, and
one test class that inherits `fedpara_plugins.testing.stage_contract.StageContract`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

from fedpara_plugins.errors import ConfigError, PayloadError, TooLargeError
from fedpara_plugins.stages.dtypes import (
    DTYPES,
    REAL_DTYPES,
    STREAM_DTYPES,
    byte_size,
    check_booleans,
    dtype_name,
    pack_dtypes,
    tensor_bytes,
    unpack_dtypes,
)

__all__ = [
    "DTYPES",
    "MAX_TENSORS",
    "REAL_DTYPES",
    "STREAM_DTYPES",
    "Notes",
    "Stage",
    "Tensors",
    "byte_size",
    "check_booleans",
    "check_count",
    "check_limit",
    "check_notes",
    "dtype_name",
    "pack_dtypes",
    "tensor_bytes",
    "unpack_dtypes",
]

Tensors: TypeAlias = dict[str, torch.Tensor]
"""Named tensors; the order of the names is part of the value."""

Notes: TypeAlias = dict[str, Any]
"""What a stage's decoder needs besides the tensors: a small plain JSON object."""

MAX_TENSORS = 2**16
"""Most tensors of a payload: each takes half a kilobyte of memory, which no other limit counts."""


class Stage(abc.ABC):
    """One reversible step from named tensors to named tensors; stateless, so instances are shared.

    Attributes:
        name: the word in ``codec = "a+b"``; letters, digits, ``_``, ``-`` and ``.``.
        lossless: whether decoding returns the same bits.
        needs_reference: whether it encodes against tensors that sender and receiver both hold.
        selects: whether it sends some of the values only; it then comes before stages that shorten.
        shortens: whether it writes each value with fewer bits; a chain has at most one such stage.
        sorts: whether it reorders the bytes of values, which helps an entropy coder only.
        entropy: whether its output is one opaque stream, so that no other stage can follow.
        owns_output: whether each tensor that `decode` returns is one of those it was given, or the
            only user of its memory. The next stage may then write over it; this saves memory.
    """

    name: str
    lossless: bool
    needs_reference: bool = False
    selects: bool = False
    shortens: bool = False
    sorts: bool = False
    entropy: bool = False
    owns_output: bool = False

    @property
    def options(self) -> Mapping[str, str]:
        """Options of this instance, as in the codec's text; decoding needs none of them."""
        return {}

    @property
    def text(self) -> str:
        """Name and options as users write them, such as ``quantise:bits=4,scope=row``."""
        given = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}:{given}" if given else self.name

    def with_options(self, options: Mapping[str, str]) -> Stage:
        """Return a stage of this kind with these options and defaults for all others.

        Args:
            options: keys and values of the codec's text, as text.

        Raises:
            ConfigError: an option is unknown or a value does not fit. A stage that does not
                override this method has no options.
        """
        if options:
            raise ConfigError(
                f"stage {self.name!r} has no options, got {', '.join(sorted(options))}; "
                f"write {self.name!r} alone"
            )
        return self

    @abc.abstractmethod
    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Encode tensors; neither argument is modified.

        Tensors that the stage does not act on pass under their names.

        Raises:
            PayloadError: a tensor cannot be encoded; the message names it and a remedy.
            MismatchError: the reference is missing or does not fit.
        """

    @abc.abstractmethod
    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Undo `encode`: same names in the same order, same shapes, same dtypes.

        Everything but the reference comes from the network and may be hostile. Check sizes
        against ``limit`` (bytes of all returned tensors) before you allocate.

        Raises:
            PayloadError: tensors or notes are not what `encode` makes, or exceed the limit.
            MismatchError: the reference is missing or does not fit.
        """


def check_limit(size: int, limit: int, what: str) -> None:
    """Raise if an output of ``size`` bytes exceeds ``limit``.

    Raises:
        TooLargeError: it does.
    """
    if size > limit:
        raise TooLargeError(
            f"{what} would take {size} bytes, more than the limit of {limit} bytes that this "
            "side's own model sets: the payload is of another model, or forged"
        )


def check_count(count: int, what: str) -> None:
    """Raise if there are more than `MAX_TENSORS` tensors.

    Raises:
        PayloadError: there are.
    """
    if count > MAX_TENSORS:
        raise PayloadError(f"{what} names {count} tensors, more than the {MAX_TENSORS} allowed")


def check_notes(stage: str, notes: Notes, fields: Mapping[str, type]) -> None:
    """Raise unless the notes have exactly these fields with exactly these types.

    Raises:
        PayloadError: a field is missing, unknown or of another type.
    """
    found = {key: type(value).__name__ for key, value in notes.items()}
    expected = {key: kind.__name__ for key, kind in fields.items()}
    if found != expected:
        raise PayloadError(f"stage {stage!r}: expected the notes {expected}, got {found}")
