"""FedPara and pFedPara in an existing Flower app.

Client side::

    import fedpara_plugins_flower as fedpara
    Net = fedpara.factorised(Net)                   # converted as the run's config says
    app = ClientApp(mods=[fedpara.client_mod])      # first in the list

Server side::

    import fedpara_plugins_flower as fedpara
    Net = fedpara.factorised(Net)
    app = fedpara.server_app(ServerApp())

The options stand in the section ``[tool.flwr.app.config.fedpara]`` of the app's pyproject.toml.
Without it, or with method and codec ``none``, the app runs exactly as before.

The names in ``__all__`` are public; everything else in the package is internal.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fedpara_plugins import PluginError, set_label_counts
from fedpara_plugins_flower._version import __version__

if TYPE_CHECKING:
    from fedpara_plugins_flower.client.mod import client_mod, client_mod_with
    from fedpara_plugins_flower.factories import factorised
    from fedpara_plugins_flower.messages.sixteen_bits import arrays
    from fedpara_plugins_flower.run import to_dense
    from fedpara_plugins_flower.server.app import server_app
    from fedpara_plugins_flower.server.evaluation import log_metrics
    from fedpara_plugins_flower.settings import FlowerSettings
    from fedpara_plugins_flower.strategies.correction import correction
    from fedpara_plugins_flower.strategies.feddyn import FedDyn
    from fedpara_plugins_flower.strategies.scaffold import Guard, Scaffold

__all__ = [
    "FedDyn",
    "FlowerSettings",
    "Guard",
    "Scaffold",
    "__version__",
    "arrays",
    "client_mod",
    "client_mod_with",
    "correction",
    "factorised",
    "log_metrics",
    "server_app",
    "set_label_counts",
    "to_dense",
]

OLDEST_FLWR = (1, 22)

_MODULES = {
    "FedDyn": "strategies.feddyn",
    "FlowerSettings": "settings",
    "Guard": "strategies.scaffold",
    "Scaffold": "strategies.scaffold",
    "arrays": "messages.sixteen_bits",
    "client_mod": "client.mod",
    "client_mod_with": "client.mod",
    "correction": "strategies.correction",
    "factorised": "factories",
    "log_metrics": "server.evaluation",
    "server_app": "server.app",
    "to_dense": "run",
}


def __getattr__(name: str) -> Any:
    """Import Flower only when the adapter is used: pluggy finds it in any environment."""
    if name == "Settings":
        warnings.warn(
            "fedpara_plugins_flower.Settings is now called FlowerSettings",
            DeprecationWarning,
            stacklevel=2,
        )
        return __getattr__("FlowerSettings")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_flwr()
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def _check_flwr() -> None:
    wanted = ".".join(map(str, OLDEST_FLWR))
    try:
        found = version("flwr")
    except PackageNotFoundError:
        raise PluginError(
            f"fedpara-plugins-flower needs flwr>={wanted}, and flwr is not installed: "
            f"pip install fedpara-plugins[flower]"
        ) from None
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST_FLWR:
        raise PluginError(
            f"fedpara-plugins-flower needs flwr>={wanted}, found {found}: upgrade flwr"
        )
