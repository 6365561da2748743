"""FedPara and pFedPara in an existing FedML project.

Change one import, or start with ``python -m fedpara_plugins_fedml main.py --cf config.yaml`` and
change nothing::

    from fedpara_plugins_fedml import FedMLRunner

The options are keys ``fedpara_*`` of the YAML, in a section of any name at the left margin. Without
them, or with method and codec ``none``, the project runs exactly as before::

    fedpara_args:
      fedpara_method: pfedpara
      fedpara_gamma: 0.5
      fedpara_codec: balanced

The names in ``__all__`` are public; everything else in the package is internal.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fedpara_plugins import PluginError, set_label_counts
from fedpara_plugins_fedml._version import __version__

if TYPE_CHECKING:
    from fedpara_plugins_fedml.runner import FedMLRunner
    from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["FedMLRunner", "FedMLSettings", "__version__", "set_label_counts"]

FEDML = "0.9.6"
"""The release that the adapter is made for; there has been none since February 2025."""

_MODULES = {"FedMLRunner": "runner", "FedMLSettings": "settings"}


def __getattr__(name: str) -> Any:
    """Import FedML only when the adapter is used: pluggy finds it in any environment."""
    if name == "Settings":
        warnings.warn(
            "fedpara_plugins_fedml.Settings is now called FedMLSettings",
            DeprecationWarning,
            stacklevel=2,
        )
        return __getattr__("FedMLSettings")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _check_fedml()
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def _check_fedml() -> None:
    try:
        found = version("fedml")
    except PackageNotFoundError:
        raise PluginError(
            f"fedpara-plugins-fedml needs fedml=={FEDML}, and fedml is not installed: see the "
            f"page docs/fedml.md for an installation that imports"
        ) from None
    if found != FEDML:
        raise PluginError(
            f"fedpara-plugins-fedml is made for fedml=={FEDML} and found {found}: install that "
            f"version"
        )
    try:
        import_module("fedml")
    except Exception as error:
        raise PluginError(f"`import fedml` fails: {_why(error)}") from error


def _why(error: Exception) -> str:
    """Return FedML's error, with the packages at fault and the remedies."""
    from fedpara_plugins_fedml.environment import findings  # it starts processes: only now

    faults = [f"{each.subject}: {each.text}" for each in findings() if each.level == "attention"]
    first = f"{type(error).__name__}: {error}".partition("\n")[0]
    return "\n  ".join([first, *(faults or ["`fedpara doctor` finds no reason"])])
