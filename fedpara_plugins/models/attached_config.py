"""The config that is attached to a converted model."""

from __future__ import annotations

from torch import nn

from fedpara_plugins.config import FedParaConfig

__all__ = ["CONFIG_ATTRIBUTE", "config_of"]

CONFIG_ATTRIBUTE = "_fedpara_config"
"""The attribute that holds it: a plain one, so that it is copied and pickled with the model."""


def config_of(model: nn.Module) -> FedParaConfig:
    """Return the config that a model was converted with; method ``none`` if it never was."""
    found = model.__dict__.get(CONFIG_ATTRIBUTE)
    return found if isinstance(found, FedParaConfig) else FedParaConfig()
