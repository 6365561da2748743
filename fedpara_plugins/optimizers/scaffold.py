"""SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1) on named tensors.

Client i, from the server's x and c and its own variate c_i, with mini-batch gradients g:

    y <- x;   K times:  y <- y - lr (g(y) - c_i + c)
    c_i' = g(x)                                         option I, a pass over the client's data at x
    c_i' = c_i - c + (x - y) / (K lr)                   option II, the mean gradient of the K steps

Server, from the clients S of the round, of N in all:

    x <- x + server_rate * mean over S of (y - x)
    c <- c + |S| / N * mean over S of (c_i' - c_i)      which keeps c the mean of all c_i

All variates start at zero. If the learning rate changes between steps, K lr is the rates' sum.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.optimizers.contributions import Contributions
from fedpara_plugins.optimizers.guard import share_kept
from fedpara_plugins.optimizers.local_round import LocalRound
from fedpara_plugins.optimizers.named_tensors import (
    State,
    add_scaled,
    check_fit,
    copied,
    copy_into,
    finite,
    norm,
    subtract,
    trained_parameters,
    zeros,
)
from fedpara_plugins.optimizers.rounds import ClientUpdate, LocalResult, Weighting, next_state
from fedpara_plugins.training.step_hooks import shared_phase

__all__ = ["LocalScaffold", "ScaffoldServer", "gradient_at"]

Option = Literal["I", "II"]
Losses = Callable[[], Iterable[tuple[Tensor, int]]]
"""Makes one pass over a client's data: the mean loss and the number of examples of each batch."""


class LocalScaffold(LocalRound):
    """One client's round: train inside this context, then read `result`.

        with LocalScaffold(model, own=c_i, server=c) as local:
            train(model)                                    # any loop with torch.optim.SGD
        local.result.own, local.result.change               # c_i' and c_i' - c_i

    An update beyond ``bound`` is shortened in the model itself, and the variate with it. A round
    that gave NaN or infinity restores the model.

    Args:
        model: the client's model, at the server's x.
        own: c_i by name of `trained_parameters`; None for zeros.
        server: c; None for zeros.
        option: ``I`` or ``II``; see the module's docstring.
        losses: for option I, a pass over this client's data.
        correct: whether the steps are corrected; if not, the variate is only collected.
        bound: on the update's norm; None for no bound.
        exchanged: names of the model that travel; None for its whole state.

    Raises:
        ConfigError: the optimizer is not plain SGD, or option I is given without ``losses``.
        MismatchError: the variates are those of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        own: Mapping[str, Tensor] | None = None,
        server: Mapping[str, Tensor] | None = None,
        option: Option = "II",
        losses: Losses | None = None,
        correct: bool = True,
        bound: float | None = None,
        exchanged: Collection[str] | None = None,
    ) -> None:
        if option == "I" and losses is None:
            raise ConfigError(
                "SCAFFOLD's option I needs the gradient at the server's model over this client's "
                "data: pass losses=lambda: ((loss_function(model(x), y), len(y)) for x, y in "
                "loader); or set option='II' on the server"
            )
        parameters = trained_parameters(model, exchanged)
        super().__init__(parameters, correct=correct, bound=bound, check=_check_plain_sgd)
        self._model = model
        self._own = _placed(own, self._parameters, "this client's variate")
        self._server = _placed(server, self._parameters, "the server's variate")
        self._losses = losses if option == "I" else None
        self._at_start: State | None = None

    def _prepare(self) -> None:
        if self._losses is not None:
            # A round of the decoupled schedule starts with private steps.
            with shared_phase(self._model):
                self._at_start = gradient_at(self._model, self._parameters, self._losses)

    def _term(self, name: str, parameter: Tensor) -> Tensor | None:
        return self._server[name] - self._own[name] if self._correct else None

    @torch.no_grad()
    def _finish(self) -> LocalResult:
        update = subtract(self._parameters, self._start)
        self._steps.check_moved(update)
        size = norm(update.values())
        variate = {name: self._new_variate(name, update[name]) for name in update}
        if not finite([*update.values(), *variate.values()]):
            copy_into(self._parameters, self._start)
            return LocalResult(None, {}, norm=size, kept=0.0, steps=self._steps.steps)
        kept = share_kept(size, self._bound)
        if kept < 1.0:
            copy_into(self._parameters, add_scaled(self._start, update, kept))
            variate = {name: kept * value for name, value in variate.items()}
        own = {name: value.cpu() for name, value in variate.items()}
        change = {name: value - self._own[name].cpu() for name, value in own.items()}
        return LocalResult(own, change, norm=size, kept=kept, steps=self._steps.steps)

    def _new_variate(self, name: str, update: Tensor) -> Tensor:
        if self._at_start is not None:
            return self._at_start[name]
        rates = self._steps.rates[name]
        if not rates:
            return self._own[name]  # no step moved the parameter
        mean = -update / rates
        return mean + self._own[name] - self._server[name] if self._correct else mean


def gradient_at(model: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Losses) -> State:
    """Return the gradient of the mean loss over a client's data, at the model as it is.

    Buffers, which a pass in training mode changes, are restored.

    Args:
        model: the model whose buffers are restored.
        parameters: by name.
        losses: one pass over the data.

    Raises:
        ConfigError: there are no data.
    """
    buffers = copied(dict(model.named_buffers()))
    total, count = zeros(parameters), 0
    for loss, examples in losses():
        parts = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, part in zip(parameters, parts, strict=True):
            if part is not None:
                total[name] += examples * part
        count += examples
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    if not count:
        raise ConfigError("SCAFFOLD's option I: losses() gave no batch")
    return {name: value / count for name, value in total.items()}


@dataclass
class ScaffoldServer:
    """The server's half of SCAFFOLD.

    Attributes:
        rate: the server's learning rate.
        weighting: ``uniform``, as published, weights all clients equally; ``examples`` weights each
            by its number of examples, in x and in c.
        sums: the sum of all clients' variates.
    """

    rate: float = 1.0
    weighting: Weighting = "uniform"
    sums: Contributions = field(default_factory=Contributions)

    def variate(self, clients: int, like: Mapping[str, Tensor]) -> State:
        """Return c for a round, in the dtypes of ``like``; {} before any client answered.

        Args:
            clients: N.
            like: the server's x.
        """
        mean = self.sums.mean(clients)
        return {name: value.to(like[name].dtype) for name, value in mean.items()}

    def step(self, x: Mapping[str, Tensor], replies: Sequence[ClientUpdate]) -> State:
        """Return the next x; names without variates (buffers) are averaged.

        This does not add the replies' changes to `sums`; see `Contributions.take`.

        Args:
            x: the state that the clients started from.
            replies: the round's replies.
        """
        return next_state(
            x,
            replies,
            weighting=self.weighting,
            then=lambda old, mean, name: old + self.rate * (mean - old),
        )


def _placed(
    given: Mapping[str, Tensor] | None, parameters: Mapping[str, nn.Parameter], what: str
) -> State:
    if given is None:
        return zeros(parameters)
    check_fit(given, parameters, what=what)
    return {name: given[name].to(p.device, p.dtype) for name, p in parameters.items()}


def _check_plain_sgd(optimizer: Optimizer) -> None:
    why = (
        "SCAFFOLD's correction and its variate, the mean gradient (x - y) / (K lr), are those of "
        "plain SGD"
    )
    if not isinstance(optimizer, torch.optim.SGD):
        raise ConfigError(
            f"{why}, and the training loop uses {type(optimizer).__name__}; use "
            f"torch.optim.SGD(..., momentum=0), or FedDyn, which works with any optimizer"
        )
    for group in optimizer.param_groups:
        for name in ("momentum", "maximize"):
            if group.get(name):
                raise ConfigError(
                    f"{why}, and the training loop's SGD has {name}={group[name]}; leave it out, "
                    f"or use FedDyn, which works with any optimizer"
                )
