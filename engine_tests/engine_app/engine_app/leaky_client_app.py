"""The client side with the split switched off: what a test of private bytes must catch."""

from __future__ import annotations

from typing import Any

from engine_app import client_app
from fedpara_plugins.exchange import client_round
from fedpara_plugins.references import downlink

app = client_app.app

_outgoing = client_round.select_outgoing
_shared_names = downlink.shared_names


def _everything(*args: Any, **kwargs: Any) -> Any:
    downlink.shared_names = lambda spec: spec.keys
    try:
        return _outgoing(*args, **kwargs)
    finally:
        downlink.shared_names = _shared_names


client_round.select_outgoing = _everything
