"""FedDyn (Acar et al. 2021, arXiv 2111.04263, algorithm 1) on named tensors.

Client k, from the server's x and its own dual d_k (the paper's gradient of L_k at its last model):

    y = argmin of L_k(y) - <d_k, y> + alpha/2 |y - x|²      approximately, by any optimizer
    d_k' = d_k - alpha (y - x)

Server, from the clients P of the round, of m in all:

    h <- h - alpha / m * sum over P of (y - x)             which keeps h the mean of all d_k
    x <- mean over P of y  -  h / alpha

All duals start at zero. h is updated before x is computed, so the first round goes beyond the
clients' mean: with d = 0 it is FedProx with mu = alpha and a server rate of 1 + |P| / m.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.optimizers.contributions import Contributions
from fedpara_plugins.optimizers.guard import share_kept
from fedpara_plugins.optimizers.local_round import LocalRound
from fedpara_plugins.optimizers.named_tensors import (
    State,
    add_scaled,
    check_fit,
    copy_into,
    finite,
    norm,
    subtract,
    trained_parameters,
    zeros,
)
from fedpara_plugins.optimizers.rounds import ClientUpdate, LocalResult, Weighting, next_state

__all__ = ["FedDynServer", "LocalFedDyn", "check_alpha"]


class LocalFedDyn(LocalRound):
    """One client's round: train inside this context, then read `result`.

        with LocalFedDyn(model, own=d_k, alpha=0.1) as local:
            train(model)                                    # any loop, any optimizer
        local.result.own                                    # d_k'

    An update beyond ``bound`` is shortened in the model itself, and the dual's change with it. A
    round that gave NaN or infinity restores the model.

    Args:
        model: the client's model, at the server's x.
        own: d_k by name of `trained_parameters`; None for zeros.
        alpha: weight of the quadratic term.
        correct: whether the dual is used; if not, it is only collected.
        bound: on the update's norm; None for no bound.
        exchanged: names of the model that travel; None for its whole state.

    Raises:
        ConfigError: alpha is out of range, or nothing can be added to the optimizer's gradients.
        MismatchError: the dual is that of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float,
        own: Mapping[str, Tensor] | None = None,
        correct: bool = True,
        bound: float | None = None,
        exchanged: Collection[str] | None = None,
    ) -> None:
        self._alpha = check_alpha(alpha)
        super().__init__(trained_parameters(model, exchanged), correct=correct, bound=bound)
        self._own = zeros(self._parameters)
        if own is not None:
            check_fit(own, self._parameters, what="this client's dual")
            self._own = {n: own[n].to(p.device, p.dtype) for n, p in self._parameters.items()}

    def _term(self, name: str, parameter: Tensor) -> Tensor:
        pull = self._alpha * (parameter - self._start[name])
        return pull - self._own[name] if self._correct else pull

    @torch.no_grad()
    def _finish(self) -> LocalResult:
        update = subtract(self._parameters, self._start)
        size = norm(update.values())
        self._steps.check_moved(update)
        if not finite(update.values()):
            copy_into(self._parameters, self._start)
            return LocalResult(None, {}, norm=size, kept=0.0, steps=self._steps.steps)
        kept = share_kept(size, self._bound)
        if kept < 1.0:
            copy_into(self._parameters, add_scaled(self._start, update, kept))
        change = {n: -self._alpha * kept * value.cpu() for n, value in update.items()}
        own = {name: self._own[name].cpu() + value for name, value in change.items()}
        return LocalResult(own, change, norm=size, kept=kept, steps=self._steps.steps)


@dataclass
class FedDynServer:
    """The server's half of FedDyn.

    Attributes:
        alpha: as on the clients.
        weighting: ``uniform``, as published, weights all clients equally; ``examples`` weights each
            by its number of examples, in x and in h.
        sums: the sum of all clients' duals.
    """

    alpha: float
    weighting: Weighting = "uniform"
    sums: Contributions = field(default_factory=Contributions)

    def change(self, x: Mapping[str, Tensor], reply: ClientUpdate) -> State:
        """Return the change of the client's dual, as it follows from the client's model.

        Args:
            x: the state that the client started from.
            reply: the client's.
        """
        after = {name: reply.arrays[name].double() for name in reply.names}
        change = subtract(after, {name: x[name].double() for name in after})
        return {name: -self.alpha * value for name, value in change.items()}

    def step(
        self,
        x: Mapping[str, Tensor],
        replies: Sequence[ClientUpdate],
        *,
        clients: int,
        correct: bool = True,
    ) -> State:
        """Return the next x; names without duals are averaged.

        The replies' changes must be in `sums` before; see `Contributions.take`.

        Args:
            x: the state that the clients started from.
            replies: the round's replies.
            clients: m.
            correct: whether h is used; if not, x becomes the clients' mean.
        """
        h = self.sums.mean(clients) if correct else {}

        def then(old: Tensor, mean: Tensor, name: str) -> Tensor:
            return mean - h[name] / self.alpha if name in h else mean

        return next_state(x, replies, weighting=self.weighting, then=then)


def check_alpha(alpha: float) -> float:
    """Return a value that can be FedDyn's alpha.

    Raises:
        ConfigError: the value is not positive and finite.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"FedDyn: alpha must be a positive number, got {alpha!r}")
    return float(alpha)
