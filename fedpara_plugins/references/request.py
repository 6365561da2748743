"""Requests to a scheme to encode a record, and its results for the same content so far."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.description import Description, HeaderForm
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references.downlink import EncodedDownlink, MessageKind
from fedpara_plugins.stages.stage import Tensors

__all__ = ["EncodeRequest", "EncodedCache", "log_whole_model"]

log = logging.getLogger("fedpara.references")


@dataclass(frozen=True)
class EncodeRequest:
    """What one call of `Downlink.encode` asks for.

    Attributes:
        record: the record's name.
        tensors: the shared tensors.
        content: their `reference_hash`.
        spec: the model.
        codec: the run's codec for downlinks, with an entropy coder that the client has.
        extra: the caller's own JSON for the header.
        form: of the header.
    """

    record: str
    tensors: Tensors
    content: str
    spec: ModelSpec
    codec: Codec
    extra: dict[str, Any]
    form: HeaderForm | None = None

    @property
    def descriptions(self) -> dict[str, Description]:
        """Return the description that the header refers to, by its hash; empty for none."""
        known = None if self.form is None else self.form.usable
        return {} if known is None else {known.digest: known}

    def key(self, kind: MessageKind, held: str | None) -> str:
        """Return a text that is equal for messages of one content that have the same bytes."""
        form = None if self.form is None else self.form.digest
        return json.dumps([kind, held, self.codec.name, self.spec.fingerprint, self.extra, form])


class EncodedCache:
    """Messages of each record's current content, for all clients that hold the same state.

    Args:
        per_record: messages kept for each record.
    """

    def __init__(self, per_record: int) -> None:
        self._per_record = per_record
        self._records: dict[str, tuple[str, OrderedDict[str, EncodedDownlink]]] = {}

    def __len__(self) -> int:
        return sum(len(messages) for _, messages in self._records.values())

    def get(
        self,
        record: str,
        content: str,
        key: str,
        encode: Callable[[], EncodedDownlink],
        *,
        usable: Callable[[EncodedDownlink], bool] = lambda message: True,
    ) -> EncodedDownlink:
        """Return the message with this key, encoded now if it is not here.

        Args:
            record: the record's name.
            content: what identifies its content; messages of another content are dropped.
            key: see `EncodeRequest.key`.
            encode: makes the message.
            usable: whether a message that is here may still be sent.
        """
        cached, messages = self._records.get(record, ("", OrderedDict()))
        if cached != content:
            messages = OrderedDict()
            self._records[record] = (content, messages)
        if key not in messages or not usable(messages[key]):
            messages[key] = encode()
        messages.move_to_end(key)
        while len(messages) > self._per_record:
            messages.popitem(last=False)
        return messages[key]


def log_whole_model(message: EncodedDownlink) -> None:
    """Log the size of a message that carries the whole model."""
    log.info(
        "fedpara: the message for a client that %s takes %d bytes",
        "lost everything" if message.kind == "full" else "holds nothing yet",
        len(message.payload),
    )
