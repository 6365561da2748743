"""Secure aggregation (the legacy SecAgg+ workflow): clients mask the shared part, uncoded.

SecAgg+ adds a mask to each quantised number, so that the masks of all clients cancel in the sum. No
step may pack or code the numbers in between. On a client the plugin's mod therefore stands after
``secaggplus_mod``, gives it the shared arrays unchanged, and holds the private ones back. On the
server the sum is completed with the server's private values before the strategy gets it, so that
lists keep their length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flwr.app import ArrayRecord, Message, RecordDict
from numpy.typing import NDArray
from torch import Tensor

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.messages.legacy_lists import PARAMETERS
from fedpara_plugins_flower.seams import (
    LEGACY_REPLIES,
    SECAGG_CONFIGS,
    SECAGG_MASKED,
    SECAGG_STAGE,
    Parameters,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
    wrap_unmask_stage,
)
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = [
    "check_order",
    "check_settings",
    "complete_sums",
    "is_secagg",
    "is_step_without_arrays",
    "masked_bytes",
    "masks_reply",
    "take_shared",
]

Complete = Callable[[list[NDArray[Any]]], list[NDArray[Any]]]


def is_secagg(content: RecordDict) -> bool:
    """Return whether a message belongs to the SecAgg+ protocol."""
    return SECAGG_CONFIGS in content


def check_settings(message: Message, settings: FlowerSettings) -> None:
    """Raise if a message belongs to SecAgg+ and the run's options do not allow that.

    Raises:
        ConfigError: if a codec is on.
    """
    if is_secagg(message.content) and not settings.uncoded:
        raise ConfigError(
            f"fedpara: SecAgg+ does not work with a codec (uplink {settings.uplink.name}, downlink "
            f"{settings.downlink.name}). Its masks are random numbers of fixed width, added to "
            f"each quantised weight; they cancel only in the sum of plain numbers, and masked "
            f"numbers cannot be compressed. Set the fedpara option codec to none; the method may "
            f"stay"
        )


def masks_reply(message: Message) -> bool:
    """Return whether ``secaggplus_mod``, before the plugin's mod, masks the reply to a message."""
    if not is_secagg(message.content):
        return False
    # That mod removes the stage before it passes the message on.
    return SECAGG_STAGE not in message.content.config_records[SECAGG_CONFIGS]


def masked_bytes(content: RecordDict) -> int:
    """Return the bytes of the masked numbers in a client's reply, which are not in its arrays."""
    masked: Any = content[SECAGG_CONFIGS].get(SECAGG_MASKED) if is_secagg(content) else None
    return sum(map(len, masked)) if isinstance(masked, list) else 0


def is_step_without_arrays(message: Message, reply: Message) -> bool:
    """Return whether a reply belongs to a step of the protocol that exchanges no arrays."""
    return is_secagg(message.content) and not reply.content.array_records


def check_order(message: Message, *, private: bool) -> None:
    """Raise if private values would be masked and sent.

    Args:
        message: as the plugin's mod received it.
        private: whether the model has private values.

    Raises:
        ConfigError: if the model has private values and the plugin's mod stands before
            ``secaggplus_mod``.
    """
    if private and is_secagg(message.content) and not masks_reply(message):
        raise ConfigError(
            "fedpara: with private factors and SecAgg+, secaggplus_mod must stand before the "
            "plugin, so that it masks only what is shared: "
            "ClientApp(mods=[secaggplus_mod, fedpara.client_mod])"
        )


def complete_sums() -> None:
    """Let SecAgg+ workflows that run on a Grid of the plugin give strategies complete lists.

    The workflow passes the unmasked sum only to the strategy, so its last stage is wrapped: while
    it runs, its strategy completes the lists first. On any other Grid the stage does what it did.
    """
    wrap_unmask_stage(_with_complete_lists)


def _with_complete_lists(original: Callable[..., Any]) -> Callable[..., Any]:
    def unmask_stage(self: Any, grid: Any, context: Any, state: Any) -> Any:
        complete: Complete | None = getattr(grid, "completed_list", None)
        if complete is None:
            return original(self, grid, context, state)
        strategy = context.strategy
        context.strategy = _CompletingStrategy(strategy, complete)
        try:
            return original(self, grid, context, state)
        finally:
            context.strategy = strategy

    return unmask_stage


class _CompletingStrategy:
    """A strategy that completes the results before the real strategy aggregates them."""

    def __init__(self, strategy: Any, complete: Complete) -> None:
        self._strategy = strategy
        self._complete = complete

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """Complete the lists of the results, and aggregate them as the strategy does."""
        done: dict[int, Parameters] = {}  # the workflow gives one object to all results
        for _, result in results:
            sums = result.parameters
            if id(sums) not in done:
                done[id(sums)] = ndarrays_to_parameters(
                    self._complete(parameters_to_ndarrays(sums))
                )
            result.parameters = done[id(sums)]
        return self._strategy.aggregate_fit(server_round, results, failures)


def take_shared(content: RecordDict, name: str, shared: Mapping[str, Tensor]) -> None:
    """Replace a record of a client's reply by the list of its shared part, which will be masked."""
    if name == PARAMETERS:
        del content[name]
        name = LEGACY_REPLIES["train"]
    content[name] = ArrayRecord([value.cpu().numpy() for value in shared.values()])
