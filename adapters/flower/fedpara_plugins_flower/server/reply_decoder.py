"""Decoding of clients' replies to ordinary arrays; a reply that cannot be used is left out."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from flwr.app import Message, RecordDict
from torch import Tensor

from fedpara_plugins import FedParaError, PayloadError
from fedpara_plugins.exchange import ReplyReader, Size, server_state
from fedpara_plugins_flower.messages import legacy_lists
from fedpara_plugins_flower.messages.records import carried_payload, to_record
from fedpara_plugins_flower.privacy import secagg
from fedpara_plugins_flower.run import Run
from fedpara_plugins_flower.server.accounting import Accounting
from fedpara_plugins_flower.server.first_contact import FirstContact
from fedpara_plugins_flower.server.outbox import Outbox
from fedpara_plugins_flower.server.strategy_arrays import averageable, warn_about_integers

__all__ = ["ReplyDecoder"]

log = logging.getLogger("flwr.fedpara")


class ReplyDecoder:
    """Decodes replies for the strategy, and counts them.

    Args:
        run: the run's settings and the models built in it.
        outbox: what the server sends.
        accounting: where the bytes are counted.
        first: is told of replies that are left out.
    """

    def __init__(
        self, run: Run, outbox: Outbox, accounting: Accounting, first: FirstContact
    ) -> None:
        self._run = run
        self._outbox = outbox
        self._accounting = accounting
        self._first = first
        self._told_integers = False

    def decode_in_place(self, reply: Message) -> bool:
        """Replace what travelled in a reply by ordinary arrays.

        Returns:
            False if the reply cannot be used; the log says why.

        Raises:
            FedParaError: the run was to begin with it.
        """
        reader = self._outbox.reader()
        try:
            content = self._decoded(reply, reader)
        except PayloadError as error:
            self._leave_out(reply, error)
            return False
        finally:
            self._accounting.received(reply, reader.size + self._masked(reply))
        reply.content = content
        return True

    def _decoded(self, reply: Message, reader: ReplyReader) -> RecordDict:
        content = RecordDict(dict(reply.content.items()))
        for name, record in reply.content.array_records.items():
            if legacy_lists.carries_nothing(record):
                continue
            payload = carried_payload(record)
            if payload is None:
                raise PayloadError(
                    f"record {name!r} carries no payload, or one that was changed on its way: no "
                    f"mod may stand before fedpara.client_mod that changes arrays"
                )
            if legacy_lists.asks_for_parameters(reply):
                content[name] = to_record(self._first_weights(reader, name, payload))
            else:
                found = reader.read(name, payload)
                self._warn_once(found.shared)
                content[name] = to_record(averageable(found.state))
        legacy_lists.unname_reply(content, reply.metadata.message_type)
        return content

    def _first_weights(self, reader: ReplyReader, name: str, payload: bytes) -> dict[str, Tensor]:
        """Return the model that a client starts the run with; the server may have built none."""
        spec, shared = reader.read_first(name, payload)
        self._warn_once(shared)
        mine = self._run.specs.setdefault(frozenset(spec.keys), spec)
        mine.check_equal(spec, here="the server", there="the client that was asked to start")
        return server_state(spec, shared)

    def _leave_out(self, reply: Message, error: PayloadError) -> None:
        node = reply.metadata.src_node_id
        if legacy_lists.asks_for_parameters(reply):
            raise FedParaError(f"fedpara: the first weights, of node {node}: {error}") from error
        log.warning("fedpara: left out the reply of node %d: %s", node, error)
        self._first.left_out(node, str(error))

    def _masked(self, reply: Message) -> Size:
        """Return the size behind masked lists: the shared part of what the client received."""
        if not secagg.is_secagg(reply.content):
            return Size()
        empty = sum(map(legacy_lists.carries_nothing, reply.content.array_records.values()))
        return (
            sum([self._outbox.size(legacy_lists.PARAMETERS)] * empty, Size()) if empty else Size()
        )

    def _warn_once(self, tensors: Mapping[str, Tensor]) -> None:
        if not self._told_integers:
            self._told_integers = True
            warn_about_integers(tensors, self._run.strategy)
