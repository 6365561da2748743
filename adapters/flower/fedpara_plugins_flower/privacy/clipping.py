"""Clipping on the clients for differential privacy: which codecs may follow it.

Flower's ``fixedclipping_mod``, ``adaptiveclipping_mod`` and ``LocalDpMod`` bound the norm of a
client's update before this plugin's mod encodes it. A codec that changes values (or keeps what it
lost and adds it to the next update) can make the norm larger again, and the noise that the server
or the mod adds was computed for the bound. Such codecs are refused; without loss the bound holds
exactly. A server that clips what it has decoded needs no such rule.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flwr.client import mod as legacy_mods
from flwr.clientapp import mod as flower_mods
from flwr.common import Message
from torch import Tensor

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.settings import Settings

__all__ = ["check_clipped_message", "check_clipping_mods"]

CLIPPING_KEY = "clipping_norm"
"""Under which Flower's client-side clipping strategies send the bound, in every version so far."""

CLIPPING_MODS = tuple(
    getattr(home, name)
    for home in (flower_mods, legacy_mods)
    for name in ("fixedclipping_mod", "adaptiveclipping_mod")
)
LOCAL_MODS = (flower_mods.LocalDpMod, legacy_mods.LocalDpMod)


def check_clipped_message(message: Message, settings: Settings) -> None:
    """Refuse, on the server, a strategy that lets clients clip before a lossy codec.

    Args:
        message: as the strategy made it.
        settings: of the run.

    Raises:
        ConfigError: it does; nothing has been sent yet.
    """
    if any(CLIPPING_KEY in record for record in message.content.config_records.values()):
        who = "this strategy (its config has 'clipping_norm')"
        _check_local(settings, who)
        _check_codecs(settings, who)


def check_clipping_mods(
    call_next: Callable[..., Any], settings: Settings, received: Mapping[str, Tensor]
) -> None:
    """Refuse, on a client, Flower's clipping mods before a lossy codec, or where they cannot clip.

    They scale arrays in place, which does nothing for arrays without dimensions, and fails for
    integers.

    Args:
        call_next: what the mod of this plugin calls: the mods after it and the app.
        settings: of the run.
        received: the complete state that the mods will see.

    Raises:
        ConfigError: such a mod is there; nothing has been trained yet.
    """
    name = next(_clipping_mods(call_next), None)
    if name is None:
        return
    _check_local(settings, f"Flower's {name}")
    _check_codecs(settings, f"Flower's {name}")
    left = [
        key for key, value in received.items() if not (value.dim() and value.is_floating_point())
    ]
    if left:
        raise ConfigError(
            f"fedpara: Flower's {name} cannot clip integers and tensors without dimensions, though "
            f"it counts them in the norm, and the model has {len(left)}: {', '.join(left[:3])}. "
            f"Use a normalisation without counters (GroupNorm), or BatchNorm with "
            f"track_running_stats=False"
        )


def _check_local(settings: Settings, who: str) -> None:
    if settings.trains_dense:
        raise ConfigError(
            f"fedpara: {who} acts on clients' updates for differential privacy, and local = "
            f'"dense" projects them onto the factors and rescales them afterwards: neither a bound '
            f'on their norm nor noise of a stated size would be left. Set local = "factors", or '
            f"use the strategy's server-side variant, which clips what has been decoded"
        )


def _check_codecs(settings: Settings, who: str) -> None:
    lossy = [c.name for c in (settings.uplink, settings.downlink) if c.feedback or not c.lossless]
    if settings.references == "grid":
        lossy.append("grid (option references)")
    if lossy:
        raise ConfigError(
            f"fedpara: {who} clips updates on the clients for differential privacy, and the codec "
            f"{lossy[0]!r} changes them afterwards, which breaks the bound on their norm. Set "
            f'codec = "lossless" or "none", or use the strategy\'s server-side variant, which '
            f"clips what has been decoded"
        )


def _clipping_mods(call_next: Callable[..., Any]) -> Iterator[str]:
    """Names of Flower's clipping mods among the functions that a chain of mods closes over."""
    waiting: list[Any] = [call_next]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        if id(function) in seen:
            continue
        seen.add(id(function))
        if any(function is known for known in CLIPPING_MODS):
            yield function.__name__
        elif isinstance(function, LOCAL_MODS):
            yield "LocalDpMod"
        waiting += [inner for inner in _held_by(function) if callable(inner)]


def _held_by(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            yield cell.cell_contents
    if isinstance(function, functools.partial):
        yield from (function.func, *function.args, *function.keywords.values())
    if hasattr(function, "__wrapped__"):
        yield function.__wrapped__
