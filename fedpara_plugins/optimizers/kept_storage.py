"""Where a client keeps its variate or dual between rounds: named bytes beside all else it keeps."""

from __future__ import annotations

import json
import secrets
from collections.abc import MutableMapping
from typing import Any

from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.optimizers.contributions import Kept
from fedpara_plugins.optimizers.named import State
from fedpara_plugins.support.storage import PrefixView

__all__ = ["OwnState"]

KNOWN, LAST, ABOUT = "known", "last", "about"


class OwnState:
    """Reads and writes what `Kept` holds.

    Args:
        storage: of the client; written by `save` only.
        algorithm: whose state it is: another algorithm's counts as none.
        name: of the client, where it has a lasting one; drawn at first contact if None.
    """

    def __init__(
        self, storage: MutableMapping[str, bytes], algorithm: str, name: str | None
    ) -> None:
        self._storage = PrefixView(storage, "drift/")
        self._algorithm = algorithm
        about = self._about()
        self.client = name or str(about.get("client") or secrets.token_hex(8))
        self.kept = Kept()
        if about.get("algorithm") != algorithm:
            return
        known, last = self._load(KNOWN), self._load(LAST)
        if known is not None:
            self.kept.known, self.kept.known_round = known, int(about.get("known", 0))
        if last is not None:
            self.kept.last, self.kept.last_round = last, int(about.get("last", 0))

    def save(self) -> None:
        """Write everything."""
        for key, tensors in ((KNOWN, self.kept.known), (LAST, self.kept.last)):
            if tensors is not None:
                self._storage[key] = encode_payload(tensors, codec=parse_codec("none"))
            elif key in self._storage:
                del self._storage[key]
        about = {
            "algorithm": self._algorithm,
            "client": self.client,
            "known": self.kept.known_round,
            "last": self.kept.last_round,
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
            return None  # what is damaged is not held; the server will notice
