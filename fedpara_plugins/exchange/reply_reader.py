"""A client's reply on the server: decoded, checked and completed, record by record.

All checks of a reply happen here, before a strategy or a rule sees it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from fedpara_plugins.codecs import DecodedPayload, decode_payload
from fedpara_plugins.errors import MismatchError
from fedpara_plugins.exchange.downlink_encoder import DownlinkEncoder
from fedpara_plugins.exchange.headers import blind_limit, spec_of
from fedpara_plugins.exchange.records import KindOf, State, check_finite, plain_spec
from fedpara_plugins.exchange.sizes import Size, size_of, tensor_bytes
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references import shared_tensors

__all__ = ["ReadRecord", "ReplyReader"]

SLACK = 1_000_000
"""Bytes that a reply may have beyond twice the model."""


@dataclass(frozen=True)
class ReadRecord:
    """One record of a reply.

    Attributes:
        shared: what the client has sent.
        state: the same, completed with the server's own private names if it is a whole model.
    """

    shared: State
    state: State


class ReplyReader:
    """Reads one client's reply.

    Args:
        sent: what the server sends; a record is compared with what was sent under its name.
        kind_of: returns the kind of a record, given its name.
        model_of: the model whose dense size the tensors of a side record are compared with.
        strict: whether a model's record must hold the very names that were sent. Otherwise a
            record of other names is left as it is.

    Attributes:
        size: of everything that was decoded, refused records included.
    """

    def __init__(
        self,
        sent: DownlinkEncoder,
        *,
        kind_of: KindOf,
        model_of: Callable[[Mapping[str, Tensor]], ModelSpec | None],
        strict: bool,
    ) -> None:
        self.size = Size()
        self._sent = sent
        self._kind_of = kind_of
        self._model_of = model_of
        self._strict = strict

    def read(self, record: str, payload: bytes) -> ReadRecord:
        """Read a record that answers what the server has sent.

        Args:
            record: its name.
            payload: its bytes.

        Raises:
            MismatchError: other names or shapes than those sent.
            PayloadError: damaged, too large, or with NaN or infinity.
        """
        shared = self._decoded(record, payload, self._limit(record)).tensors
        return ReadRecord(shared, self.completed(record, shared))

    def read_first(self, record: str, payload: bytes) -> tuple[ModelSpec, State]:
        """Read the model that a client starts the run with; the server may have built none.

        Returns:
            The model that the client describes, and its shared state.

        Raises:
            PayloadError: damaged, with NaN or infinity, or without a sound description of a model.
        """
        limit = blind_limit(payload)
        decoded = self._decoded(record, payload, limit)
        return spec_of(decoded.header, decoded.tensors, limit=limit), decoded.tensors

    def completed(self, record: str, shared: State) -> State:
        """Return a complete state, with private names filled from the server's own state.

        Strategies and rules then see in every reply the names that the server has.

        Args:
            record: its name; what was never sent under that name stays as it is.
            shared: what a client answers.

        Raises:
            MismatchError: a tensor has another shape than the one of its name that was sent, or
                other names came and the reader is strict.
        """
        if not self._sent.has_record(record):
            return shared
        full = self._sent.content(record)
        _check_shapes(shared, full)
        unlike = sorted(set(self._sent.shared_names(record)) ^ shared.keys())
        if not unlike:
            return {key: shared.get(key, value) for key, value in full.items()}
        if self._strict and self._kind_of(record) == "model":
            raise MismatchError(
                f"the client answers with other names than this server sent: {unlike[:5]} "
                f"({len(unlike)} differ); build the same model on both sides"
            )
        return shared

    def _decoded(self, record: str, payload: bytes, limit: int) -> DecodedPayload:
        decoded = decode_payload(payload, references=self._sent.references, limit=limit)
        self.size += self._size(record, decoded.tensors)
        check_finite(decoded.tensors)
        return decoded

    def _limit(self, record: str) -> int:
        """Return the bytes that a record may decode to: those of a model, with some slack."""
        names = [record] if self._sent.has_record(record) else self._sent.records
        largest = max((tensor_bytes(self._sent.content(name)) for name in names), default=0)
        return 2 * largest + SLACK

    def _size(self, record: str, tensors: State) -> Size:
        spec = self._sent.spec(record) if self._sent.has_record(record) else plain_spec(tensors)
        if self._kind_of(record) != "model":
            spec = self._model_of(tensors) or spec
        return size_of(shared_tensors(spec, tensors), spec)


def _check_shapes(answer: State, sent: State) -> None:
    """Raise for a tensor of another shape, which no average accepts: the round would end."""
    for key, value in answer.items():
        if key in sent and value.shape != sent[key].shape:
            raise MismatchError(
                f"the client answers with {key!r} of shape {tuple(value.shape)}, this server sent "
                f"it with shape {tuple(sent[key].shape)}; build the same model on both sides"
            )
