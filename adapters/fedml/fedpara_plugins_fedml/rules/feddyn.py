"""FedDyn (Acar et al. 2021, arXiv 2111.04263, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fedpara_plugins.optimizers import (
    FedDynServer,
    LocalFedDyn,
    LocalResult,
    State,
    StoredCorrectionState,
    check_alpha,
)
from fedpara_plugins_fedml.rules.base import Visit
from fedpara_plugins_fedml.rules.drift import DriftRule, Usable
from fedpara_plugins_fedml.rules.local_drift import LocalDrift

__all__ = ["FedDyn", "LocalFedDynRule"]


class FedDyn(DriftRule):
    """The server's half; nothing travels beside the model.

    Args:
        alpha: ``feddyn_alpha``: weight of the quadratic term.
        options: of `DriftRule`.

    Raises:
        ConfigError: alpha is not positive.
    """

    name = "FedDyn"
    mends = "FedML's penalties have no gradient, and its duals belong to places, not clients"

    def __init__(self, *, alpha: float, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = check_alpha(alpha)
        self.server = FedDynServer(alpha=alpha, weighting=self.weighting, sums=self.sums)

    def task(self, client: str) -> Mapping[str, Any]:
        """Alpha too, so that the server's counts on both sides."""
        return {**super().task(client), "alpha": self.alpha}

    def next_x(self, x: State, usable: Sequence[Usable]) -> State:
        """The clients' mean minus h / alpha."""
        for found in usable:
            received = x if found.answer.received is None else found.answer.received
            self.take(found, self.server.change(received, found.reply))
        replies = [found.reply for found in usable]
        return self.server.step(x, replies, clients=self.clients, correct=self._correct)


class LocalFedDynRule(LocalDrift):
    """The client's half."""

    name = "FedDyn"

    def local(self, model: nn.Module, own: State | None, visit: Visit) -> LocalFedDyn:
        """Steps of any optimizer, each with alpha (y - x) - d."""
        return LocalFedDyn(
            model,
            own=own,
            alpha=float(visit.task["alpha"]),
            correct=bool(visit.task["correct"]),
            bound=float(visit.task["bound"]) or None,
            exchanged=visit.exchanged,
        )

    def work(self, result: LocalResult) -> dict[str, State]:
        """Nothing."""
        return {}

    def lost(self, own: StoredCorrectionState, errors: Mapping[str, State], visit: Visit) -> None:
        """The server takes the step from what it decodes of y."""
        own.correction.correct(errors.get("model", {}), float(visit.task["alpha"]))
