"""The section ``[tool.flwr.app.config.fedpara]`` of an app, read from a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpara_plugins.exchange import ExchangeSettings

__all__ = ["PREFIX", "FlowerSettings"]

PREFIX = "fedpara."
"""Prefix of the plugin's keys: Flower flattens nested config tables to dotted keys."""

ENTRY_OPTIONS = ("serverapp", "clientapp", "model")
"""Options that `fedpara_plugins_flower.entry` reads to find the app; a run has no use for them."""


@dataclass(frozen=True)
class FlowerSettings(ExchangeSettings):
    """Everything that the user may set for one run of a Flower app; see `ExchangeSettings`."""

    @classmethod
    def from_run_config(
        cls, run_config: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> FlowerSettings:
        """Read and validate the section; all defaults (method and codec ``none``) without one.

        Args:
            run_config: of the run; its section takes precedence.
            options: the same options, set in Python.

        Raises:
            ConfigError: if an option, method or codec is unknown, or a value is out of range.
        """
        section = {key.replace("-", "_"): value for key, value in (options or {}).items()}
        section |= {
            key[len(PREFIX) :].replace("-", "_"): value
            for key, value in run_config.items()
            if key.startswith(PREFIX)
        }
        for name in ENTRY_OPTIONS:
            section.pop(name, None)
        return cls(**cls.read(section))
