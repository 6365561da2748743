"""The client side with the split switched off: what a test of private bytes must catch."""

from __future__ import annotations

from typing import Any

import fedpara_plugins_flower.client.mod as client_side
from engine_app import client_app
from fedpara_plugins.references import downlink

app = client_app.app

_encode = client_side.encode
_shared_names = downlink.shared_names


def _encode_everything(*args: Any, **kwargs: Any) -> Any:
    downlink.shared_names = lambda spec: spec.keys
    try:
        return _encode(*args, **kwargs)
    finally:
        downlink.shared_names = _shared_names


client_side.encode = _encode_everything
