"""A client's variate or dual in storage between rounds, as named bytes beside its other state."""

from __future__ import annotations

import json
import secrets
from collections.abc import MutableMapping
from typing import Any

from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.optimizers.contributions import CorrectionState
from fedpara_plugins.optimizers.named_tensors import State
from fedpara_plugins.support.storage import PrefixView

__all__ = ["StoredCorrectionState"]

CONFIRMED, PENDING, ABOUT = "known", "last", "about"
"""Keys in the storage; states of earlier releases have the same."""


class StoredCorrectionState:
    """A `CorrectionState` that is read from storage and written back.

    Args:
        storage: the client's storage; only `save` writes into it.
        algorithm: name of the algorithm; a state of another algorithm counts as none.
        name: the client's name, if it has a lasting one; otherwise drawn at first contact.

    Attributes:
        client: the client's name.
        correction: the state itself.
    """

    def __init__(
        self, storage: MutableMapping[str, bytes], algorithm: str, name: str | None
    ) -> None:
        self._storage = PrefixView(storage, "drift/")
        self._algorithm = algorithm
        about = self._about()
        self.client = name or str(about.get("client") or secrets.token_hex(8))
        self.correction = CorrectionState()
        if about.get("algorithm") != algorithm:
            return
        confirmed, pending = self._load(CONFIRMED), self._load(PENDING)
        if confirmed is not None:
            self.correction.confirmed = confirmed
            self.correction.confirmed_round = int(about.get(CONFIRMED, 0))
        if pending is not None:
            self.correction.pending = pending
            self.correction.pending_round = int(about.get(PENDING, 0))

    def save(self) -> None:
        """Write the state and the client's name."""
        for key, tensors in (
            (CONFIRMED, self.correction.confirmed),
            (PENDING, self.correction.pending),
        ):
            if tensors is not None:
                self._storage[key] = encode_payload(tensors, codec=parse_codec("none"))
            elif key in self._storage:
                del self._storage[key]
        about = {
            "algorithm": self._algorithm,
            "client": self.client,
            CONFIRMED: self.correction.confirmed_round,
            PENDING: self.correction.pending_round,
        }
        self._storage[ABOUT] = json.dumps(about).encode()

    def _about(self) -> dict[str, Any]:
        try:
            found = json.loads(self._storage.get(ABOUT, b"{}"))
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def _load(self, key: str) -> State | None:
        payload = self._storage.get(key)
        if payload is None:
            return None
        try:
            return decode_payload(payload, limit=2 * len(payload)).tensors
        except PayloadError:
            return None  # a damaged state counts as lost; the server will notice
