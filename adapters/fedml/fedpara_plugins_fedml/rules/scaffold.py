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
from fedpara_plugins_fedml.rules.base import Visit
from fedpara_plugins_fedml.rules.drift import CHANGE, DriftRule, Usable
from fedpara_plugins_fedml.rules.local_drift import LocalDrift
from fedpara_plugins_fedml.rules.losses import losses_of

__all__ = ["LocalScaffoldRule", "Scaffold"]

VARIATE = "variate"
"""The record of the server's c."""


class Scaffold(DriftRule):
    """The server's half; c travels beside the model, and changes of c_i come back.

    Args:
        rate: ``server_lr``: of the step from x to the clients' mean.
        option: how clients make their new variate: the mean gradient of their steps (``II``), or
            the gradient at the server's model (``I``), a pass over their data.
        options: of `DriftRule`.
    """

    name = "SCAFFOLD"
    mends = "FedML keeps every client's variate at zero and takes the last client's model alone"
    needs_change = True

    def __init__(self, *, rate: float, option: Literal["I", "II"] = "II", **options: Any) -> None:
        super().__init__(**options)
        self.option = option
        self.server = ScaffoldServer(rate=rate, weighting=self.weighting, sums=self.sums)
        self._variate: State = {}

    def begin(self, server_round: int, x: State, clients: Sequence[str]) -> None:
        """As the others; and c."""
        super().begin(server_round, x, clients)
        self._variate = self.server.variate(self.clients, x)

    def task(self, client: str) -> Mapping[str, Any]:
        """The option too, so that the server's counts on both sides."""
        return {**super().task(client), "option": self.option}

    def records(self) -> Mapping[str, State]:
        """c; nothing before any client has answered, when it is zero."""
        return {VARIATE: self._variate} if self._variate else {}

    def next_x(self, x: State, usable: Sequence[Usable]) -> State:
        """One step towards the clients' mean; c is the mean of all variates."""
        for found in usable:
            self.take(found, found.change)
        return self.server.step(x, [found.reply for found in usable])


class LocalScaffoldRule(LocalDrift):
    """The client's half."""

    name = "SCAFFOLD"
    updates = frozenset({CHANGE})

    def local(self, model: nn.Module, own: State | None, visit: Visit) -> LocalScaffold:
        """Steps of plain SGD, each with c - c_i.

        Raises:
            ConfigError: option I, and the trainer's loss is not known.
        """
        losses = None
        if visit.task.get("option") == "I":
            losses = losses_of(visit.trainer, visit.train_data, visit.device, visit.args)
            model.to(visit.device)
            model.train()
        return LocalScaffold(
            model,
            own=own,
            server=visit.records.get(VARIATE),
            option="II" if losses is None else "I",
            losses=losses,
            correct=bool(visit.task["correct"]),
            bound=float(visit.task["bound"]) or None,
            exchanged=visit.exchanged,
        )

    def work(self, result: LocalResult) -> dict[str, State]:
        """The change of c_i."""
        return {CHANGE: result.change}

    def lost(self, own: StoredCorrectionState, errors: Mapping[str, State], visit: Visit) -> None:
        """c_i is what the server decodes of it."""
        own.correction.correct(errors.get(CHANGE, {}), -1.0)
