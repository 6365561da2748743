"""The section ``[tool.flwr.app.config.fedpara]`` of an app, read from a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpara_plugins.exchange import ExchangeSettings

__all__ = ["PREFIX", "Settings"]

PREFIX = "fedpara."
"""Flower flattens nested config tables to dotted keys."""

ENTRY_OPTIONS = ("serverapp", "clientapp", "model")
"""Where `fedpara_plugins_flower.entry` finds the app; no business of a run's settings."""


@dataclass(frozen=True)
class Settings(ExchangeSettings):
    """Everything the user may set for one run; see `ExchangeSettings`."""

    @classmethod
    def from_run_config(
        cls, run_config: Mapping[str, Any], options: Mapping[str, Any] | None = None
    ) -> Settings:
        """Read and validate the section; all defaults (method and codec ``none``) without one.

        Args:
            run_config: of the run; its section wins.
            options: the same options, set in Python.

        Raises:
            ConfigError: unknown option, method or codec, or a value out of range.
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
