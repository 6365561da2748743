"""What the operator of a device has set there, which a run's config may tighten and never loosen.

A run's config comes from whoever starts the run. The operator sets privacy options in the node's
config, ``flower-supernode --node-config 'fedpara-private="head.*" fedpara-method="pfedpara"'``, or
in Python with `client_mod_with` where the app's code is the operator's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fedpara_plugins import ConfigError, FedParaConfig
from fedpara_plugins.exchange import has_private_half

__all__ = ["node_pins", "tightened"]

PATHS = ("state_dir", "client_checkpoints")
"""Places of private values on the device, which are the operator's to choose."""

ADDED = ("private_head", "label_prior")
"""Options that add private values to the head; Python alone sets them on a device."""

LAYERS = ("exclude", "include", "min_size")
"""Options by which layers stay dense, and are shared as a whole: with a pinned method, a run may
leave out no layer that the operator has not named."""

PINNED = ("method", "private", *LAYERS, *PATHS)

OTHER_KEYS = ("id",)
"""Keys of the plugin in a node's config that are no options."""


def node_pins(node_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plugin's options in a node's config, by name.

    Args:
        node_config: with keys such as ``fedpara-private`` or ``fedpara.private``.

    Raises:
        ConfigError: a key is no option that can be set there.
    """
    found: dict[str, Any] = {}
    for key, value in node_config.items():
        if not key.lower().startswith("fedpara"):
            continue
        name = key[len("fedpara-") :].replace("-", "_")
        known_prefix = key.startswith(("fedpara-", "fedpara."))
        if known_prefix and name in OTHER_KEYS:
            continue
        if name not in PINNED or not known_prefix:  # to pass it over would undo what it pins
            near = get_close_matches(name, PINNED, n=1)
            hint = f"; did you mean fedpara-{near[0].replace('_', '-')}?" if near else "."
            known = ", ".join(f"fedpara-{other.replace('_', '-')}" for other in PINNED)
            raise ConfigError(
                f"fedpara: unknown key {key!r} in this node's config{hint} Known: {known}"
            )
        found[name] = value
    return found


def tightened(section: dict[str, Any], pins: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Return a run's options, with what the operator has set.

    Args:
        section: the run's options, by name.
        pins: the operator's.
        where: the operator's place, in words.

    Raises:
        ConfigError: the run would share what the operator keeps private; names both sides.
    """
    result = dict(section)
    if pinned := FedParaConfig(private=pins.get("private") or ()).private:
        theirs = FedParaConfig(private=section.get("private") or ()).private
        result["private"] = list(dict.fromkeys((*pinned, *theirs)))
    if has_private_half(str(pins.get("method") or "none")):
        _check_methods(section, pins, where)
        _check_layers(section, pins, where)
    if added := _added(pins):
        _check_converts(section, added[0], where)
    return result | {name: pins[name] for name in (*added, *PATHS) if name in pins}


def _check_methods(section: Mapping[str, Any], pins: Mapping[str, Any], where: str) -> None:
    pinned = str(pins["method"])
    method = str(section.get("method") or "none")
    if not has_private_half(method):
        raise ConfigError(
            f"fedpara: this device keeps method {pinned!r} ({where}), and the run's config has "
            f"method {method!r}, which keeps no half of a weight on the device. Set method = "
            f'"{pinned}" for the run, or change what is set on the device'
        )
    allowed = FedParaConfig(overrides=pins.get("overrides") or ()).overrides
    for row in FedParaConfig(overrides=section.get("overrides") or ()).overrides:
        other = str(dict(row[1]).get("method", method))
        if row not in allowed and not has_private_half(other):
            raise ConfigError(
                f"fedpara: this device keeps method {pinned!r} ({where}), and the run's option "
                f"overrides gives {row[0]!r} method {other!r}, which keeps no half of a weight on "
                f"the device. Leave that out of the run's options, or change what is set on the "
                f"device"
            )


def _check_layers(section: Mapping[str, Any], pins: Mapping[str, Any], where: str) -> None:
    """Raise for layers that the run leaves dense, and the operator does not."""
    mine, theirs = _layer_options(pins), _layer_options(section)
    rows = [dict(row[1]) for row in theirs.overrides if row not in mine.overrides]
    sizes = [int(v) for row in rows for k, v in row.items() if k.replace("-", "_") == "min_size"]
    narrower = theirs.include and not (mine.include and {*mine.include} <= {*theirs.include})
    for name, loosened in {
        "exclude": not {*theirs.exclude} <= {*mine.exclude},
        "include": bool(narrower),
        "min_size": max([theirs.min_size, *sizes]) > mine.min_size,
    }.items():
        if loosened:
            shown = name.replace("_", "-")
            raise ConfigError(
                f"fedpara: this device keeps method {pins['method']!r} ({where}), and the run's "
                f"option {shown} leaves layers dense, of which nothing would stay on the device. "
                f"Leave that out of the run's options, or set the same on the device (in a node's "
                f"config: fedpara-{shown})"
            )


def _layer_options(options: Mapping[str, Any]) -> FedParaConfig:
    names = (*LAYERS, "overrides")
    return FedParaConfig.from_mapping({k: v for k, v in options.items() if k in names})


def _added(options: Mapping[str, Any]) -> list[str]:
    given = {name: options[name] for name in ADDED if options.get(name)}
    config = FedParaConfig.from_mapping({"schedule": "decoupled", **given})
    return [name for name in ADDED if getattr(config, name)]


def _check_converts(section: Mapping[str, Any], option: str, where: str) -> None:
    if str(section.get("method") or "none") == "none":
        raise ConfigError(
            f"fedpara: this device has the option {option} ({where}), whose values stay on it, and "
            f"the run's config has method 'none', which keeps none apart. Set the same options for "
            f"the run"
        )
