"""Who holds what on the downlink, so that coming back or joining late costs no full model.

    downlink = PerClientDownlink(folder=Path("references"))        # server; or GridDownlink
    coded = downlink.encode(client, "model", state, spec=spec, codec=codec)
    ...                                                            # coded.payload travels
    held = ClientReferences()                                      # client
    received = held.receive("model", payload, limit=10**8)         # LostReferenceError: say so
    held.keep("model", received)
    ...                                                            # received.reference travels
    downlink.acknowledge(client, "model", reference)

The schemes and what they cost are described in ``docs/references.md``. Nothing here knows a
framework.
"""

from __future__ import annotations

from fedpara_plugins.references.client import ClientReferences, LostReferenceError, Received
from fedpara_plugins.references.coded import Coded, Downlink, alike, shared_part
from fedpara_plugins.references.grid import GridDownlink
from fedpara_plugins.references.per_client import PerClientDownlink
from fedpara_plugins.references.store import ReferenceStore

__all__ = [
    "ClientReferences",
    "Coded",
    "Downlink",
    "GridDownlink",
    "LostReferenceError",
    "PerClientDownlink",
    "Received",
    "ReferenceStore",
    "alike",
    "shared_part",
]
