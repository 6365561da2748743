"""Clipping on clients for differential privacy: checks that nothing breaks its bound afterwards.

Flower's ``fixedclipping_mod``, ``adaptiveclipping_mod`` and ``LocalDpMod`` bound the norm of a
client's update before this plugin's mod encodes it. The noise that the server or the mod adds is
computed for that bound. A codec that changes values (or adds an earlier codec error to the next
update) can make the norm larger again. Such codecs are refused; with a lossless codec the bound
holds exactly. A server that clips decoded updates needs no such rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flwr.app import Message
from torch import Tensor

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.seams import (
    CLIPPING_MODS,
    CLIPPING_NORM,
    LOCAL_DP_MODS,
    reachable_functions,
)
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = ["adds_noise", "check_clipped_message", "check_clipping_mods"]


def adds_noise(call_next: Callable[..., Any]) -> bool:
    """Return whether a mod of Flower's adds noise to all that a client answers with.

    Args:
        call_next: the function that the plugin's mod calls: the mods after it and the app.
    """
    return any(isinstance(function, LOCAL_DP_MODS) for function in reachable_functions(call_next))


def check_clipped_message(message: Message, settings: FlowerSettings) -> None:
    """Raise for a strategy whose clients clip before a lossy codec; called on the server.

    Args:
        message: as the strategy made it, before it is sent.
        settings: of the run.

    Raises:
        ConfigError: if the run's options would break the bound.
    """
    if any(CLIPPING_NORM in record for record in message.content.config_records.values()):
        who = f"this strategy (its config has {CLIPPING_NORM!r})"
        _check_local(settings, who)
        _check_lossless(settings, who)


def check_clipping_mods(
    call_next: Callable[..., Any], settings: FlowerSettings, received: Mapping[str, Tensor]
) -> None:
    """Raise for clipping mods of Flower before a lossy codec, or that cannot clip; on a client.

    The mods scale arrays in place. That does nothing for arrays without dimensions, and fails for
    integers.

    Args:
        call_next: the function that the plugin's mod calls: the mods after it and the app.
        settings: of the run.
        received: the complete state that the mods will see.

    Raises:
        ConfigError: if there is such a mod; nothing has been trained yet.
    """
    name = next(_clipping_mods(call_next), None)
    if name is None:
        return
    _check_local(settings, f"Flower's {name}")
    _check_lossless(settings, f"Flower's {name}")
    masks = [key for key, value in received.items() if _holds_infinity(value)]
    if masks:
        raise ConfigError(
            f"fedpara: Flower's {name} cannot clip a model that holds infinities, because the norm "
            f"of its update is not a number: {', '.join(masks[:3])}. Keep a mask out of the state: "
            f"register_buffer(..., persistent=False)"
        )
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


def _holds_infinity(value: Tensor) -> bool:
    return value.is_floating_point() and bool(value.double().isinf().any())


def _check_local(settings: FlowerSettings, who: str) -> None:
    if settings.trains_dense:
        raise ConfigError(
            f"fedpara: {who} acts on clients' updates for differential privacy, and local = "
            f'"dense" projects them onto the factors and rescales them afterwards: neither a bound '
            f'on their norm nor noise of a stated size would be left. Set local = "factors", or '
            f"use the strategy's server-side variant, which clips what has been decoded"
        )


def _check_lossless(settings: FlowerSettings, who: str) -> None:
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
    """Yield the names of Flower's clipping mods in a chain of mods."""
    for function in reachable_functions(call_next):
        if any(function is known for known in CLIPPING_MODS):
            yield function.__name__
        elif isinstance(function, LOCAL_DP_MODS):
            yield "LocalDpMod"
