"""The description of a record's tensors and model, which two sides share and name by its hash.

Headers of version 2 refer to it: whatever text of the description stands in a header is replaced by
one control character. A description is text and nothing else. A wrong one makes a header that is
refused, or other than its sender meant, and never one that is trusted more than any other.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fedpara_plugins.errors import MismatchError, PayloadError

__all__ = [
    "LONGEST_TEXT",
    "NO_DESCRIPTION",
    "UNKNOWN",
    "Description",
    "HeaderForm",
    "LostDescriptionError",
    "held_description",
]

LONGEST_TEXT = 4 * 2**20
"""Most characters of a description, and of a header, with everything written out."""

NO_DESCRIPTION = "0" * 32
"""Stands in the place of the hash in a header that is written whole."""

DIGITS = 32
"""Hexadecimal digits of a description's hash: 128 bits."""

PLANES = frozenset(
    {
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
    }
)
"""The dtypes that stage ``planes`` gives one more dimension."""

PIECES = 4
SHORTEST = 4
"""Characters of a piece that is worth replacing."""


class LostDescriptionError(MismatchError):
    """A header refers to a description that this side does not hold."""


@dataclass(frozen=True)
class Description:
    """The model and the layout of a record, as text.

    Attributes:
        pieces: JSON of the model; the names, the shapes, and the shapes with a dimension of planes
            in front, each as JSON without the outer brackets.
    """

    pieces: tuple[str, ...]

    @classmethod
    def of(
        cls, model: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor]
    ) -> Description:
        """Return the description of decoded tensors and of the model in their header.

        Args:
            model: the header's field of that name.
            tensors: decoded, in the sender's order.
        """
        shapes = [list(value.shape) for value in tensors.values()]
        planes = [
            [value.dtype.itemsize, *value.shape] if value.ndim and value.dtype in PLANES else shape
            for value, shape in zip(tensors.values(), shapes, strict=True)
        ]
        lists = (_json(part)[1:-1] for part in (list(tensors), shapes, planes))
        return cls((_json(model), *lists))

    @cached_property
    def text(self) -> str:
        """The pieces, one a line; JSON in ASCII has no line breaks."""
        return "\n".join(self.pieces)

    @cached_property
    def digest(self) -> str:
        """The first 128 bits of the text's SHA-256, as 32 hexadecimal digits."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:DIGITS]

    def shorten(self, text: str) -> str:
        """Return a header's text with control characters in the place of the pieces."""
        for place, piece in enumerate(self.pieces, 1):
            if len(piece) >= SHORTEST:
                text = text.replace(piece, chr(place))
        return text

    def expand(self, text: str, *, most: int) -> str:
        """Undo `shorten`.

        Args:
            text: as received.
            most: characters that the result may have.

        Raises:
            PayloadError: it would have more; nothing has been allocated then.
        """
        counts = [text.count(chr(place)) for place in range(1, PIECES + 1)]
        grown = sum(n * (len(piece) - 1) for n, piece in zip(counts, self.pieces, strict=True))
        if len(text) + grown > most:
            raise PayloadError(
                f"the payload's header would have {len(text) + grown} characters, at most {most} "
                f"are read"
            )
        for place, piece in enumerate(self.pieces, 1):
            text = text.replace(chr(place), piece)
        return text

    # Stored

    def to_bytes(self) -> bytes:
        """Return the text, compressed, for a file of one's own."""
        return zlib.compress(self.text.encode(), 9)

    @classmethod
    def from_bytes(cls, data: bytes) -> Description | None:
        """Return what `to_bytes` stored; None if it is damaged."""
        try:
            text = zlib.decompressobj().decompress(data, LONGEST_TEXT + 1).decode("ascii")
        except (zlib.error, UnicodeDecodeError):
            return None
        pieces = tuple(text.split("\n"))
        return cls(pieces) if len(pieces) == PIECES and len(text) <= LONGEST_TEXT else None


UNKNOWN = Description(("null", "", "", ""))
"""In place of one that is not held, for a look at the rest of a header."""


@dataclass(frozen=True)
class HeaderForm:
    """A header of version 2, for a receiver that reads it.

    Attributes:
        description: that the receiver holds; None writes everything out.
    """

    description: Description | None = None

    @property
    def digest(self) -> str:
        """The hash of the description; that of none is all zeros."""
        return NO_DESCRIPTION if self.usable is None else self.usable.digest

    @property
    def usable(self) -> Description | None:
        """The description, unless it is longer than a receiver keeps."""
        known = self.description
        return known if known is not None and len(known.text) <= LONGEST_TEXT else None


def held_description(
    digest: str, descriptions: Mapping[str, Description] | None
) -> Description | None:
    """Return the description that a header refers to; None if it refers to none.

    Args:
        digest: its hash, as the payload names it.
        descriptions: those that this side holds, by hash.

    Raises:
        LostDescriptionError: this side does not hold it.
    """
    if digest == NO_DESCRIPTION:
        return None
    found = (descriptions or {}).get(digest)
    if found is None:
        held = ", ".join(list(descriptions or ())[-3:]) or "none"
        raise LostDescriptionError(
            f"the payload's header refers to description {digest}, this side holds {held}; the "
            f"sender must write the header whole"
        )
    return found


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
