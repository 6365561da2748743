"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1, both options)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn

from fedpara_plugins.optimizers import (
    LocalResult,
    LocalScaffold,
    ScaffoldServer,
    State,
    StoredCorrectionState,
)
from fedpara_plugins_fedml.rules.base import RoundContext
from fedpara_plugins_fedml.rules.drift import CHANGE, DriftRule, UsableReply
from fedpara_plugins_fedml.rules.local_drift import LocalDrift
from fedpara_plugins_fedml.rules.losses import losses_of

__all__ = ["LocalScaffoldRule", "Scaffold"]

VARIATE = "variate"
"""The record of the server's c."""


class Scaffold(DriftRule):
    """The server's part; it sends c besides the model, and clients send changes of c_i.

    Args:
        rate: ``server_lr``, the rate of the step from x to the clients' mean.
        option: the clients' new variate: the mean gradient of their steps (``II``), or the gradient
            at the server's model (``I``), which costs a pass over their data.
        options: of `DriftRule`.
    """

    name = "SCAFFOLD"
    differs = "FedML keeps every client's variate at zero and takes the last client's model alone"
    needs_change = True
    reply_records = frozenset({CHANGE})

    def __init__(self, *, rate: float, option: Literal["I", "II"] = "II", **options: Any) -> None:
        super().__init__(**options)
        self.option = option
        self.server = ScaffoldServer(rate=rate, weighting=self.weighting, sums=self.sums)
        self._variate: State = {}

    def begin(self, server_round: int, x: State, clients: Sequence[str]) -> None:
        """Begin a round, and compute its c."""
        super().begin(server_round, x, clients)
        self._variate = self.server.variate(self.clients, x)

    def task(self, client: str) -> Mapping[str, Any]:
        """Return the option too, so that both sides use the server's."""
        return {**super().task(client), "option": self.option}

    def records(self) -> Mapping[str, State]:
        """Return c; nothing while it is zero, before any client has answered."""
        return {VARIATE: self._variate} if self._variate else {}

    def next_x(self, x: State, usable: Sequence[UsableReply]) -> State:
        """Return x after a step towards the clients' mean; c becomes the mean of all variates."""
        for each in usable:
            self.add_change(each, each.change)
        return self.server.step(x, [each.reply for each in usable])


class LocalScaffoldRule(LocalDrift):
    """The client's part."""

    name = "SCAFFOLD"
    updates = frozenset({CHANGE})

    def local(
        self, model: nn.Module, own: State | None, local_round: RoundContext
    ) -> LocalScaffold:
        """Return a context that adds c - c_i to the steps of plain SGD.

        Raises:
            ConfigError: if the option is I and the trainer's loss is not known.
        """
        losses = None
        if local_round.task.get("option") == "I":
            losses = losses_of(
                local_round.trainer, local_round.train_data, local_round.device, local_round.args
            )
            model.to(local_round.device)
            model.train()
        return LocalScaffold(
            model,
            own=own,
            server=local_round.records.get(VARIATE),
            option="II" if losses is None else "I",
            losses=losses,
            correct=bool(local_round.task["correct"]),
            bound=float(local_round.task["bound"]) or None,
            exchanged=local_round.exchanged,
        )

    def records(self, result: LocalResult) -> dict[str, State]:
        """Return the change of c_i."""
        return {CHANGE: result.change}

    def correct_kept(
        self, own: StoredCorrectionState, errors: Mapping[str, State], local_round: RoundContext
    ) -> None:
        """Correct c_i, so that it is what the server decodes."""
        own.correction.correct(errors.get(CHANGE, {}), -1.0)
