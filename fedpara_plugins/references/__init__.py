"""Downlinks coded against what each client holds, so that clients may be away or join late.

    downlink = PerClientDownlink(folder=Path("references"))        # server; or GridDownlink
    message = downlink.encode(client, "model", state, spec=spec, codec=codec)
    ...                                                            # message.payload travels
    held = ClientReferences()                                      # client
    received = held.receive("model", payload, limit=10**8)         # may raise LostReferenceError
    held.keep("model", received)
    ...                                                            # received.reference travels
    downlink.acknowledge(client, "model", reference)

``docs/references.md`` describes the two schemes and what they cost. A public face of the core; it
knows no framework, and may import everything from ``codecs`` down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpara_plugins._moved import serve_old_names
from fedpara_plugins.references.client import (
    ClientReferences,
    DecodedDownlink,
    LostReferenceError,
)
from fedpara_plugins.references.downlink import (
    Downlink,
    EncodedDownlink,
    same_layout,
    shared_tensors,
)
from fedpara_plugins.references.grid import GridDownlink
from fedpara_plugins.references.per_client import PerClientDownlink
from fedpara_plugins.references.store import ReferenceStore

__all__ = [
    "ClientReferences",
    "DecodedDownlink",
    "Downlink",
    "EncodedDownlink",
    "GridDownlink",
    "LostReferenceError",
    "PerClientDownlink",
    "ReferenceStore",
    "same_layout",
    "shared_tensors",
]

if not TYPE_CHECKING:
    __getattr__ = serve_old_names(
        __name__,
        {
            "Coded": "EncodedDownlink",
            "Received": "DecodedDownlink",
            "alike": "same_layout",
            "shared_part": "shared_tensors",
        },
    )
