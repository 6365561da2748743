"""The client side with the split switched off: what a test of private bytes must catch."""

from __future__ import annotations

from engine_app import client_app
from fedpara_plugins.exchange import OwnModels

app = client_app.app

OwnModels.hidden_names = lambda *given: set()
