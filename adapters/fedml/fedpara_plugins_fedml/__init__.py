"""The FedML adapter: registered, and not usable yet. Whatever is asked of it says what it lacks.

Until it is there, ``fedpara_plugins.convert(model, method="fedpara")`` before ``FedMLRunner(...)``
gives a FedML project smaller messages by itself, since the factors are the model's state.
"""

from __future__ import annotations

from typing import Any

from fedpara_plugins import PluginError
from fedpara_plugins_fedml._version import __version__
from fedpara_plugins_fedml.plugin import ADAPTER

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    raise PluginError(
        f"fedpara_plugins_fedml.{name} does not exist: the FedML adapter still lacks "
        f"{'; '.join(ADAPTER.lacks)}. For FedPara without private factors or codec, call "
        f"fedpara_plugins.convert(model, method='fedpara') before FedMLRunner(...)."
    )
