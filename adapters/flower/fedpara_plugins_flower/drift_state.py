"""A client's variate or dual between rounds, beside everything else that it keeps."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, MutableMapping
from typing import Any

from flwr.common import Context

from fedpara_plugins import PayloadError
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.optimizers import Kept, State
from fedpara_plugins.storage import Part
from fedpara_plugins_flower.client_storage import client_storage, lasting_name
from fedpara_plugins_flower.run import Run
from fedpara_plugins_flower.settings import Settings

__all__ = ["OwnState", "own_state"]

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
        self._storage = Part(storage, "drift/")
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


@contextlib.contextmanager
def own_state(context: Context, algorithm: str, run: Run | None) -> Iterator[OwnState]:
    """This client's state: part of a round of the plugin's mod, or on its own.

    In a round of the mod nothing lasts before the reply is complete.

    Args:
        context: of the client.
        algorithm: whose state is meant.
        run: that was active when the client's function was called, if any.
    """
    name = lasting_name(context)
    if run is not None and run.storage is not None:
        yield OwnState(run.storage, algorithm, name)
        return
    folder = Settings.from_run_config(context.run_config).state_dir
    with contextlib.closing(client_storage(context, folder)) as storage:
        yield OwnState(storage, algorithm, name)
        storage.commit()
