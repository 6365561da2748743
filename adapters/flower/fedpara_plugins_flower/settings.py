"""The section ``[tool.flwr.app.config.fedpara]`` of an app, read from a run's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedpara_plugins.exchange import ExchangeSettings, has_private_half
from fedpara_plugins_flower.pins import node_pins, tightened

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
        return cls(**cls.read(_section(run_config, options or {})))

    @classmethod
    def of_client(
        cls,
        run_config: Mapping[str, Any],
        options: Mapping[str, Any],
        kept: Mapping[str, Mapping[str, Any]],
        node_config: Mapping[str, Any],
    ) -> FlowerSettings:
        """Read the section on a client, which may keep more private than the message says.

        Args:
            run_config: as for `from_run_config`.
            options: likewise; those about privacy hold whatever the run says (`pins.tightened`).
            kept: further options that do, by where they come from, in words.
            node_config: of the node.

        Raises:
            ConfigError: as for `from_run_config`, or the run would share what is kept private.
        """
        section = _section(run_config, options)
        own = {key.replace("-", "_"): value for key, value in options.items()}
        pins = {"options of client_mod_with": own, **kept, "node config": node_pins(node_config)}
        for where, pinned in pins.items():
            section = tightened(section, pinned, where=where)
        return cls(**cls.read(section))

    @property
    def hides(self) -> bool:
        """Whether anything stays on the device with these options."""
        config = self.config
        added = config.method != "none" and (config.private_head or config.label_prior)
        half = has_private_half(config.method)
        return bool(config.private) or half or added or bool(config.overrides)


def _section(run_config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    section = {key.replace("-", "_"): value for key, value in options.items()}
    section |= {
        key[len(PREFIX) :].replace("-", "_"): value
        for key, value in run_config.items()
        if key.startswith(PREFIX)
    }
    for name in ENTRY_OPTIONS:
        section.pop(name, None)
    return section
