"""FedPara and pFedPara (ICLR 2022, arXiv 2108.06098) for models that already exist.

    model = fedpara_plugins.convert(Net(), method="fedpara", gamma=0.1)
    print(fedpara_plugins.report(model))
    ...                                            # your own training loop and optimizer
    dense = fedpara_plugins.to_dense(model)        # an ordinary model again

Symbols follow the paper. A weight W (m, n) is composed of operands X Yᵀ with X (m, R), Y (n, R); a
kernel's operand also has a core T (R, R, k1, k2). gamma sets the rank R between the smallest that
can give full rank (0) and the dense budget (1). K is how far a composed weight moves per training
step, dense = 1. *Shared* state travels, *private* state stays on the device.

The package imports torch and no federated-learning framework; the adapters for Flower and FedML are
separate distributions (``fedpara-plugins[flower]``, ``[fedml]``).
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

from fedpara_plugins._moved import new_path, serve_old_paths
from fedpara_plugins._version import __version__
from fedpara_plugins.codecs.config_check import check_codecs
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import (
    ConfigError,
    ConversionError,
    FedParaError,
    MismatchError,
    PayloadError,
    PluginError,
    TooLargeError,
)
from fedpara_plugins.layers import composed_once
from fedpara_plugins.ledger import Ledger, LedgerEntry
from fedpara_plugins.models import (
    ModelSpec,
    Report,
    Split,
    convert,
    merge,
    report,
    split,
    to_dense,
)
from fedpara_plugins.models.config_checks import CONFIG_CHECKS
from fedpara_plugins.plugins import hookimpl
from fedpara_plugins.training import JacobianCorrection, check_optimizer, set_label_counts

__all__ = [
    "ConfigError",
    "ConversionError",
    "FedParaConfig",
    "FedParaError",
    "JacobianCorrection",
    "Ledger",
    "LedgerEntry",
    "MismatchError",
    "ModelSpec",
    "PayloadError",
    "PluginError",
    "Report",
    "Split",
    "TooLargeError",
    "__version__",
    "check_optimizer",
    "composed_once",
    "convert",
    "hookimpl",
    "merge",
    "report",
    "set_label_counts",
    "split",
    "to_dense",
]


class _Face(ModuleType):
    """The package itself, whose functions keep their names when old modules are imported.

    The import system binds a submodule to its package: ``import fedpara_plugins.convert`` would
    otherwise replace the function `convert`.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, ModuleType) and callable(self.__dict__.get(name))):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> ModuleType:
        if new_path(f"{self.__name__}.{name}") is None:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return import_module(f"{self.__name__}.{name}")


CONFIG_CHECKS.append(check_codecs)
serve_old_paths()
sys.modules[__name__].__class__ = _Face
