"""Frozen tensors: both sides hold them, so that no message carries them.

What is frozen, the server's model says when a run starts. A message names each such tensor with the
hash of its values, and a client puts its own in the place. One whose own values differ is refused,
or gets the server's once, losslessly, if it has none or none that look trained.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedpara_plugins.codecs import encode_payload, parse_codec, reference_hash
from fedpara_plugins.exchange.records import State
from fedpara_plugins.exchange.sizes import Size, tensor_bytes
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.support.units import readable_bytes

__all__ = [
    "CHANGED",
    "FROZEN",
    "FrozenAgreement",
    "changed_record",
    "frozen_record",
    "tensor_hash",
]

log = logging.getLogger("fedpara")

FROZEN = "fedpara_frozen_"
"""Prefix of the records that carry frozen tensors once, before the name of the record."""

CHANGED = "fedpara_changed_"
"""Prefix of a reply's records of frozen buffers that the client has changed."""

ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""Relative difference, by dtype, that is an average's rounding and no change."""

LOSSLESS = "lossless"


def frozen_record(record: str) -> str:
    """Return the name of the record that carries the frozen tensors of another."""
    return FROZEN + record


def changed_record(record: str) -> str:
    """Return the name of the record that carries the changed frozen buffers of another."""
    return CHANGED + record


def tensor_hash(name: str, value: Tensor) -> str:
    """Return 32 hexadecimal digits of a tensor's name, dtype, shape and values."""
    return reference_hash({name: value.detach().cpu().contiguous()})[:32]


@dataclass(frozen=True)
class _Agreed:
    values: State
    hashes: Mapping[str, str]
    buffers: frozenset[str] = frozenset()

    def without(self, names: Collection[str]) -> _Agreed:
        """Return all but some of them."""
        return _Agreed(
            {k: v for k, v in self.values.items() if k not in names},
            {k: v for k, v in self.hashes.items() if k not in names},
            self.buffers.difference(names),
        )


class FrozenAgreement:
    """The frozen tensors of each record that a server sends, as they were at the start."""

    def __init__(self) -> None:
        self._agreed: dict[str, _Agreed] = {}
        self._heard: dict[str, set[str]] = {}
        self._lacking: dict[str, set[str]] = {}
        self._sent: dict[str, set[str]] = {}
        self._payloads: dict[str, tuple[Mapping[str, str], bytes]] = {}

    def settle(
        self,
        record: str,
        full: State,
        spec: ModelSpec,
        own: Mapping[str, Tensor],
        buffers: Collection[str] = (),
    ) -> tuple[State, ModelSpec]:
        """Return what is sent under a name, with its frozen tensors as at the start.

        A tensor that differs by more than an average's rounding has been changed by the strategy,
        and is sent from then on.

        Args:
            record: its name.
            full: its tensors.
            spec: of them.
            own: at the first call, the frozen ones as the server's model holds them, by the
                record's names.
            buffers: those of ``own`` that are buffers, which a client may change.

        Returns:
            The tensors, and their spec, which names the frozen ones.
        """
        if record not in self._agreed:
            first = self._first(record, full, spec, own)
            among = frozenset(buffers).intersection(first.values)
            self._agreed[record] = replace(first, buffers=among)
        agreed = self._agreed[record]
        heard = self._heard.pop(record, set())
        changed = [
            name
            for name, value in agreed.values.items()
            if name in full and not _is_same(full[name], value, exactly=name in heard)
        ]
        if changed:
            log.info(
                "fedpara: %d frozen tensors of record %r have been changed (the first is %r): they "
                "are sent from now on", len(changed), record, changed[0],
            )  # fmt: skip
            agreed = agreed.without(changed)
            self._agreed[record] = agreed
        values = {name: agreed.values.get(name, value) for name, value in full.items()}
        hashes = {name: digest for name, digest in agreed.hashes.items() if name in full}
        if not hashes:
            return values, spec
        return values, replace(spec, frozen=hashes, buffers=agreed.buffers.intersection(hashes))

    def _first(
        self, record: str, full: State, spec: ModelSpec, own: Mapping[str, Tensor]
    ) -> _Agreed:
        private = spec.private_keys
        values = {}
        for name, mine in own.items():
            sent = full.get(name)
            if sent is None or name in private or sent.shape != mine.shape:
                continue
            mine = mine.detach().cpu()
            # Rounds that were continued hold an average of what clients hold.
            resumed = not torch.equal(sent, mine.to(sent.dtype)) and _is_same(sent, mine)
            values[name] = mine.to(sent.dtype).clone() if resumed else sent
        if values and len(values) == len(spec.shared_keys):
            return _Agreed({}, {})  # nothing would be left to send
        if values:
            log.info(
                "fedpara: %d of %d tensors of record %r are frozen and not sent (%s of %s): "
                "clients use their own, which have to be the same; send = \"all\" sends them",
                len(values), len(full), record,
                readable_bytes(tensor_bytes(values)), readable_bytes(tensor_bytes(full)),
            )  # fmt: skip
        return _Agreed(values, {name: tensor_hash(name, value) for name, value in values.items()})

    def note_changed(self, record: str, names: Iterable[str]) -> None:
        """Note that a client has changed buffers of a record, by however little."""
        self._heard.setdefault(record, set()).update(names)

    def nbytes(self, record: str) -> int:
        """Return the bytes of the frozen tensors of a record."""
        return tensor_bytes(self.values(record))

    def values(self, record: str) -> State:
        """Return the frozen tensors of a record; not to be changed."""
        found = self._agreed.get(record)
        return {} if found is None else found.values

    def note_lacking(self, client: str, records: Iterable[str]) -> int:
        """Note that a client has no frozen tensors of its own for some records.

        Args:
            client: its name.
            records: as it names them; those that have no frozen tensors are passed over.

        Returns:
            The number of records with frozen tensors among these.
        """
        found = {record for record in records if self.values(record)}
        self._lacking.setdefault(client, set()).update(found)
        return len(found)

    def note_lost(self, client: str, record: str) -> None:
        """Note that a client lost all that it held of a record: a copy that it was sent, too.

        Args:
            client: its name.
            record: the record's name.
        """
        if record in self._sent.get(client, ()):
            self._lacking[client].add(record)

    def payload_for(self, client: str, record: str) -> bytes | None:
        """Return the frozen tensors of a record for a client that lacks them, once; else None."""
        if record not in self._lacking.get(client, ()):
            return None
        self._lacking[client].discard(record)
        self._sent.setdefault(client, set()).add(record)
        agreed = self._agreed[record]
        if not agreed.values:  # the strategy has changed them since, so they are sent to everybody
            return None
        known, payload = self._payloads.get(record, ({}, b""))
        if known != agreed.hashes:
            payload = encode_payload(agreed.values, codec=parse_codec(LOSSLESS).resolved(()))
            self._payloads[record] = agreed.hashes, payload
        log.info(
            "fedpara: client %s lacks the frozen tensors of record %r: they travel once, %s",
            client, record, readable_bytes(len(payload)),
        )  # fmt: skip
        return payload

    def size(self, record: str) -> Size:
        """Return the size of a record's frozen tensors, before coding."""
        values = self.values(record)
        return Size(len(values), tensor_bytes(values), 0)


def _is_same(value: Tensor, agreed: Tensor, *, exactly: bool = False) -> bool:
    """Return whether values differ by no more than an average's rounding, or not at all."""
    if value.shape != agreed.shape:
        return False
    rounding = 0.0 if exactly else ROUNDING.get(agreed.dtype, 0.0)
    if not rounding or torch.equal(value, agreed.to(value.dtype)):
        return bool(torch.equal(value, agreed.to(value.dtype)))
    return torch.allclose(value, agreed.to(value.dtype), rtol=rounding, atol=0, equal_nan=True)
