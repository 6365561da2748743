"""FedPara and pFedPara in an existing Flower app.

Client side::

    import fedpara_plugins_flower as fedpara
    Net = fedpara.factorised(Net)                   # converted as the run's config says
    app = ClientApp(mods=[fedpara.client_mod])      # first in the list

Server side::

    import fedpara_plugins_flower as fedpara
    Net = fedpara.factorised(Net)
    app = fedpara.server_app(ServerApp())

What to do is read from the section ``[tool.flwr.app.config.fedpara]`` of the app's pyproject.toml;
without it, or with method and codec ``none``, the app is exactly what it was.
"""

from __future__ import annotations

from fedpara_plugins_flower._version import __version__
from fedpara_plugins_flower.client import client_mod
from fedpara_plugins_flower.run import factorised, to_dense
from fedpara_plugins_flower.server import server_app
from fedpara_plugins_flower.settings import Settings

__all__ = ["Settings", "__version__", "client_mod", "factorised", "server_app", "to_dense"]
