"""Lines that a user adds to an app, as errors quote them when they are missing."""

from __future__ import annotations

__all__ = ["ADD_MOD", "ADD_WRAPPER"]

ADD_MOD = "app = ClientApp(mods=[fedpara.client_mod]), the mod first in the list"
ADD_WRAPPER = "app = fedpara.server_app(ServerApp())"
