"""FedProx (Li et al. 2020, arXiv 1812.06127): clients minimise F(w) + mu/2 |w - x|²."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fedpara_plugins.optimizers import AddedGradient, copied, subtract, trained_parameters
from fedpara_plugins_fedml.rules.base import LocalRule, ReplyExtras, RoundContext
from fedpara_plugins_fedml.rules.fedavg import FedAvg

__all__ = ["FedProx", "LocalFedProx"]


class FedProx(FedAvg):
    """The server's part: the clients' mean."""

    name = "FedProx"
    differs = "FedML lets the clients of the first round train on each other's result"


class LocalFedProx(LocalRule):
    """The client's part: mu (w - x) is added to every gradient, whatever trainer computes it.

    Private factors have no such term: x does not contain them.

    Args:
        mu: weight of the term; 0 is FedAvg.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu

    @contextmanager
    def around(self, model: nn.Module, local_round: RoundContext) -> Iterator[ReplyExtras]:
        """Add the term to the gradients of the steps in this context."""
        parameters = trained_parameters(model, local_round.exchanged)
        start = copied(parameters)

        def term(name: str, parameter: Tensor) -> Tensor | None:
            return self.mu * (parameter.detach() - start[name]) if self.mu else None

        with AddedGradient(parameters, term) as steps:
            yield ReplyExtras()
        steps.check_moved(subtract(parameters, start))
