"""Checks of options that `convert` makes and rooms above this one know how to make."""

from __future__ import annotations

from collections.abc import Callable

from fedpara_plugins.config import FedParaConfig

__all__ = ["CONFIG_CHECKS"]

CONFIG_CHECKS: list[Callable[[FedParaConfig], None]] = []
"""Called with the options of each conversion; they raise `ConfigError`. The package's face adds the
check of codecs, whose room stands above ``models``."""
