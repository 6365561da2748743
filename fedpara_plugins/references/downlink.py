"""The interface of a downlink scheme, and what it does with tensors before they are encoded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.description import HeaderForm
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_split import shared_names
from fedpara_plugins.stages.stage import Tensors

__all__ = ["Downlink", "EncodedDownlink", "MessageKind", "same_layout", "shared_tensors"]

MessageKind = Literal["update", "repeat", "first", "full", "plain"]


@dataclass(frozen=True)
class EncodedDownlink:
    """One downlink message, ready to be sent.

    Attributes:
        payload: the bytes.
        reference: hash of the state that the receiver holds once it has decoded them, against which
            it takes the delta of its reply.
        kind: ``update`` (coded against what the client holds), ``repeat`` (the client has the coded
            form of this very content already), ``first`` (against version 0), ``full``
            (self-contained), ``plain`` (the codec needs no reference).
    """

    payload: bytes
    reference: str
    kind: MessageKind


class Downlink(Protocol):
    """A scheme that decides what each downlink is coded against; safe to call from any thread."""

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
        form: HeaderForm | None = None,
    ) -> EncodedDownlink:
        """Encode ``tensors`` for one client."""

    def acknowledge(self, client: str, record: str, held: str | None) -> None:
        """Note that a client has answered and holds this state, by hash; None for no state."""

    def refused(self, client: str, record: str, holds: Sequence[str] = ()) -> None:
        """Note that a client could not decode its last message, and what it holds, by hash."""

    @property
    def references(self) -> Mapping[str, Tensors]:
        """Return every state that a client may take a delta against, by hash."""


def shared_tensors(spec: ModelSpec, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return those of ``tensors`` that may be sent: all but the model's private names."""
    allowed = set(shared_names(spec)) | (set(tensors) - set(spec.keys))
    return {name: value for name, value in tensors.items() if name in allowed}


def same_layout(tensors: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> bool:
    """Return whether both have the same names, shapes and dtypes."""
    return tensors.keys() == reference.keys() and all(
        value.shape == reference[name].shape and value.dtype == reference[name].dtype
        for name, value in tensors.items()
    )
