"""FedPara and pFedPara (ICLR 2022, arXiv 2108.06098) for models that already exist.

    model = fedpara_plugins.convert(Net(), method="fedpara", gamma=0.1)
    print(fedpara_plugins.report(model))
    ...                                            # your own training loop and optimizer
    dense = fedpara_plugins.to_dense(model)        # an ordinary model again

Symbols follow the paper: a weight W (m, n) is composed of operands X Yᵀ with X (m, R), Y (n, R); a
kernel's operand has a core T (R, R, k1, k2) besides. gamma sets the rank R between the smallest
that can give full rank (0) and the dense budget (1). K is how far a composed weight moves per
training step, dense = 1. *Shared* state travels, *private* state stays on the device.

This package imports torch and no federated-learning framework; adapters for Flower and FedML are
distributions of their own (``fedpara-plugins[flower]``, ``[fedml]``).
"""

from __future__ import annotations

from fedpara_plugins._version import __version__
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.models.convert import convert
from fedpara_plugins.models.to_dense import to_dense
from fedpara_plugins.errors import (
    ConfigError,
    ConversionError,
    FedParaError,
    MismatchError,
    PayloadError,
    PluginError,
)
from fedpara_plugins.training.label_counts import set_label_counts
from fedpara_plugins.training.jacobian import JacobianCorrection
from fedpara_plugins.ledger import Ledger, LedgerEntry
from fedpara_plugins.layers.composed_once import composed_once
from fedpara_plugins.training.optimizer_check import check_optimizer
from fedpara_plugins.plugins import hookimpl
from fedpara_plugins.models.report import Report, report
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.split import Split, merge, split

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
