"""The conversion of a run's model, where a model that is fine-tuned may have nothing to convert."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TypeVar

from torch import nn

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import NothingToConvertError
from fedpara_plugins.models.conversion import convert
from fedpara_plugins.text import shortened

__all__ = ["convert_or_keep"]

log = logging.getLogger("fedpara")

M = TypeVar("M", bound=nn.Module)

_told: set[str] = set()

LONGEST = 400
"""Characters of the reason in the log."""


def convert_or_keep(model: M, config: FedParaConfig, *, may_keep: bool = False) -> M:
    """Convert a model; keep one as it is whose weights are frozen or an adapter's.

    Such a model is fine-tuned. What it sends is small, and the codec alone acts on it. One line of
    the log says so.

    Args:
        model: of the app.
        config: of the run.
        may_keep: keep any other model too that has nothing to convert, since another one is
            converted beside it.

    Raises:
        ConfigError: see `convert`.
        ConversionError: see `convert`.
    """
    try:
        return convert(model, config)
    except NothingToConvertError as error:
        if not (error.for_tuning or may_keep) or config.private_head or config.label_prior:
            raise
        if str(error) not in _told:
            _told.add(str(error))
            log.info(
                "fedpara: method %s changes nothing, and the codec alone acts: %s",
                config.method,
                shortened(str(error), LONGEST),
            )
        return convert(model, replace(config, method="none"))
