"""The config that a converted model carries."""

from __future__ import annotations

from torch import nn

from fedpara_plugins.config import FedParaConfig

__all__ = ["CONFIG_ATTRIBUTE", "config_of"]

CONFIG_ATTRIBUTE = "_fedpara_config"
"""Where a converted model keeps its config: a plain attribute, so it is copied and pickled."""


def config_of(model: nn.Module) -> FedParaConfig:
    """The config that a model was converted with; method ``none`` if it never was."""
    found = model.__dict__.get(CONFIG_ATTRIBUTE)
    return found if isinstance(found, FedParaConfig) else FedParaConfig()
