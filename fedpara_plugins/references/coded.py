"""What a downlink scheme offers, and the few things that all of them do alike."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_split import shared_names
from fedpara_plugins.stages.stage import Tensors

__all__ = ["Coded", "Downlink", "Kind", "alike", "shared_part"]

Kind = Literal["update", "repeat", "first", "full", "plain"]


@dataclass(frozen=True)
class Coded:
    """One downlink, ready to be sent.

    Attributes:
        payload: the bytes.
        reference: hash of what the receiver has once it has decoded them; what it takes the delta
            of its reply against.
        kind: ``update`` (coded against what the client holds), ``repeat`` (the client has the coded
            form of this very content already), ``first`` (against version 0), ``full``
            (self-contained), ``plain`` (the codec needs no reference).
    """

    payload: bytes
    reference: str
    kind: Kind


class Downlink(Protocol):
    """A scheme of who holds what; safe to call from several threads."""

    def encode(
        self,
        client: str,
        record: str,
        tensors: Mapping[str, Tensor],
        *,
        spec: ModelSpec,
        codec: Codec,
        decoders: Collection[str] | None = None,
        extra: Mapping[str, Any] | None = None,
        content: str | None = None,
    ) -> Coded:
        """The payload of ``tensors`` for one client."""

    def acknowledge(self, client: str, record: str, held: str | None) -> None:
        """A client has answered, and said by hash what it holds now; None for nothing."""

    def refused(self, client: str, record: str, holds: Sequence[str] = ()) -> None:
        """A client could not decode its last message; ``holds`` is what it does have, by hash."""

    @property
    def references(self) -> Mapping[str, Tensors]:
        """Everything that some client may take a delta against, by hash."""


def shared_part(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Tensors:
    """What of ``tensors`` may be sent: everything but the model's private names."""
    allowed = set(shared_names(spec)) | (set(tensors) - set(spec.keys))
    return {name: value for name, value in tensors.items() if name in allowed}


def alike(tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> bool:
    """Same names, shapes and dtypes."""
    return tensors.keys() == reference.keys() and all(
        value.shape == reference[name].shape and value.dtype == reference[name].dtype
        for name, value in tensors.items()
    )
