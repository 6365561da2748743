"""The client side with the split switched off: what a test of private bytes must catch."""

from __future__ import annotations

from typing import Any

import fedpara_plugins_flower.client as client_side
import fedpara_plugins_flower.coding as coding
from engine_app import client_app

app = client_app.app

_encode = client_side.encode
_shared_names = coding.shared_names


def _encode_everything(*args: Any, **kwargs: Any) -> Any:
    coding.shared_names = lambda spec: spec.keys
    try:
        return _encode(*args, **kwargs)
    finally:
        coding.shared_names = _shared_names


client_side.encode = _encode_everything
