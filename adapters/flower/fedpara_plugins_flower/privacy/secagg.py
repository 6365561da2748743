"""Secure aggregation (the legacy SecAgg+ workflow): what is masked is the shared part, uncoded.

The mask of SecAgg+ is added to plain quantised numbers, number by number, so that the masks of all
clients cancel in the sum. Nothing that packs or codes the numbers may come between. On a client the
plugin therefore stands behind ``secaggplus_mod``, gives it the shared arrays as they are, and keeps
the private ones back; on the server the sum gets the server's own private values before the
strategy sees it, so that lists keep their length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flwr.common import (
    ArrayRecord,
    Message,
    Parameters,
    RecordDict,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from numpy.typing import NDArray
from torch import Tensor

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.messages.legacy_lists import PARAMETERS, REPLIES
from fedpara_plugins_flower.settings import Settings

__all__ = [
    "check_order",
    "check_settings",
    "complete_sums",
    "is_secagg",
    "is_step_without_app",
    "masked_bytes",
    "masks_reply",
    "take_shared",
]

CONFIGS = "secaggplus_configs"
"""Flower's record that makes a message one of the protocol."""

STAGE = "stage"

Complete = Callable[[list[NDArray[Any]]], list[NDArray[Any]]]


def is_secagg(content: RecordDict) -> bool:
    """Whether a message is one of the SecAgg+ protocol."""
    return CONFIGS in content


def check_settings(message: Message, settings: Settings) -> None:
    """Raise if the run's options do not go with secure aggregation.

    Raises:
        ConfigError: a codec is on.
    """
    if is_secagg(message.content) and not settings.uncoded:
        raise ConfigError(
            f"fedpara: SecAgg+ does not go with a codec (uplink {settings.uplink.name}, downlink "
            f"{settings.downlink.name}). Its masks are random numbers of fixed width, added to "
            f"each quantised weight; they cancel only in the sum of plain numbers, and masked "
            f"numbers cannot be compressed. Set the fedpara option codec to none; the method may "
            f"stay"
        )


def masks_reply(message: Message) -> bool:
    """On a client: whether `secaggplus_mod`, outside of the plugin, will mask this answer."""
    # That mod takes the stage out before it hands the message on.
    return is_secagg(message.content) and STAGE not in message.content.config_records[CONFIGS]


def masked_bytes(content: RecordDict) -> int:
    """Bytes of the masked numbers in a client's answer; they travel beside the arrays."""
    masked: Any = content[CONFIGS].get("masked_params") if is_secagg(content) else None
    return sum(map(len, masked)) if isinstance(masked, list) else 0


def is_step_without_app(message: Message) -> bool:
    """On a client: whether this is a step of the protocol in which the app takes no part."""
    return is_secagg(message.content) and not message.content.array_records


def check_order(message: Message, *, private: bool) -> None:
    """Raise if private values would be masked and sent.

    Args:
        message: as the plugin's mod received it.
        private: whether the model has private values.

    Raises:
        ConfigError: the plugin stands before `secaggplus_mod`, and the model has private values.
    """
    if private and is_secagg(message.content) and not masks_reply(message):
        raise ConfigError(
            "fedpara: with private factors and SecAgg+, secaggplus_mod must stand before the "
            "plugin, so that it masks only what is shared: "
            "ClientApp(mods=[secaggplus_mod, fedpara.client_mod])"
        )


def complete_sums() -> None:
    """Let SecAgg+ workflows that run on a Grid of the plugin give strategies complete lists.

    The workflow hands the unmasked sum to nobody but the strategy, so its last stage is wrapped:
    while it runs, the strategy it knows completes the lists first. On any other Grid the stage
    does what it did.
    """
    from flwr.server.workflow import SecAggPlusWorkflow

    original = SecAggPlusWorkflow.unmask_stage
    if hasattr(original, "_fedpara_completes"):
        return

    @functools.wraps(original)
    def unmask_stage(self: Any, grid: Any, context: Any, state: Any) -> bool:
        complete: Complete | None = getattr(grid, "completed_list", None)
        if complete is None:
            return original(self, grid, context, state)
        strategy = context.strategy
        context.strategy = _Completing(strategy, complete)
        try:
            return original(self, grid, context, state)
        finally:
            context.strategy = strategy

    unmask_stage._fedpara_completes = True  # type: ignore[attr-defined]
    SecAggPlusWorkflow.unmask_stage = unmask_stage  # type: ignore[method-assign]


class _Completing:
    """A strategy whose results are completed before it aggregates them."""

    def __init__(self, strategy: Any, complete: Complete) -> None:
        self._strategy = strategy
        self._complete = complete

    def __getattr__(self, name: str) -> Any:
        return getattr(self._strategy, name)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        """As the strategy's own, on complete lists."""
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
    """On a client: replace a record by the list of its shared part, which will be masked."""
    if name == PARAMETERS:
        del content[name]
        name = REPLIES["train"]
    content[name] = ArrayRecord([value.cpu().numpy() for value in shared.values()])
