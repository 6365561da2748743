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
from fedpara_plugins_fedml.rules.base import RoundContext
from fedpara_plugins_fedml.rules.drift import DriftRule, UsableReply
from fedpara_plugins_fedml.rules.local_drift import LocalDrift

__all__ = ["FedDyn", "LocalFedDynRule"]


class FedDyn(DriftRule):
    """The server's part; no tensors are sent besides the model.

    Args:
        alpha: ``feddyn_alpha``, the weight of the quadratic term.
        options: of `DriftRule`.

    Raises:
        ConfigError: if alpha is not positive.
    """

    name = "FedDyn"
    differs = "FedML's penalties have no gradient, and its duals belong to places, not clients"

    def __init__(self, *, alpha: float, **options: Any) -> None:
        super().__init__(**options)
        self.alpha = check_alpha(alpha)
        self.server = FedDynServer(alpha=alpha, weighting=self.weighting, sums=self.sums)

    def task(self, client: str) -> Mapping[str, Any]:
        """Return alpha too, so that both sides use the server's."""
        return {**super().task(client), "alpha": self.alpha}

    def next_x(self, x: State, usable: Sequence[UsableReply]) -> State:
        """Return the clients' mean minus h / alpha."""
        for each in usable:
            received = x if each.client_reply.received is None else each.client_reply.received
            self.add_change(each, self.server.change(received, each.reply))
        replies = [each.reply for each in usable]
        return self.server.step(x, replies, clients=self.clients, correct=self._correct)


class LocalFedDynRule(LocalDrift):
    """The client's part."""

    name = "FedDyn"

    def local(self, model: nn.Module, own: State | None, local_round: RoundContext) -> LocalFedDyn:
        """Return a context that adds alpha (y - x) - d to the steps of any optimizer."""
        return LocalFedDyn(
            model,
            own=own,
            alpha=float(local_round.task["alpha"]),
            correct=bool(local_round.task["correct"]),
            bound=float(local_round.task["bound"]) or None,
            exchanged=local_round.exchanged,
        )

    def records(self, result: LocalResult) -> dict[str, State]:
        """Return no tensors."""
        return {}

    def correct_kept(
        self, own: StoredCorrectionState, errors: Mapping[str, State], local_round: RoundContext
    ) -> None:
        """Correct the dual: the server computes its change from the decoded y."""
        own.correction.correct(errors.get("model", {}), float(local_round.task["alpha"]))
