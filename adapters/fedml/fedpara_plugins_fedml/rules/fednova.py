"""FedNova (Wang et al. 2020, arXiv 2007.07481): clients' steps, normalised, then averaged.

Client i, with tau_i steps from x to y_i and |a_i| (see `Normaliser`): d_i = (x - y_i) / |a_i|.
Server, with p_i the clients' shares of the examples:

    step = tau * sum of p_i d_i      tau = sum of p_i |a_i|, or of p_i tau_i with a proximal term
    b <- gmf b + step                x <- x - b

|a_i| is how far, in units of the learning rate, the client's optimizer would have gone with
gradients of 1: tau_i for plain SGD, the sums of the paper for momentum, and for the proximal term.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedpara_plugins import ConfigError
from fedpara_plugins.models import diverged
from fedpara_plugins.optimizers import (
    AddedGradient,
    copied,
    subtract,
    trained_parameters,
)
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.rules.base import (
    ClientReply,
    LocalRule,
    Mean,
    ReplyExtras,
    RoundContext,
    Rule,
    State,
)
from fedpara_plugins_fedml.rules.keys import flag, number
from fedpara_plugins_fedml.rules.normaliser import Normaliser, check_sgd, counting_steps
from fedpara_plugins_fedml.rules.own_trainer import OwnTrainer

__all__ = ["FedNova", "LocalFedNova", "SGDTrainer"]


MOST_STEPS = 1e9
"""Largest number of steps, and normaliser, that a client may report; with more, one report would
make the average infinite."""


class FedNova(Rule):
    """The server's part.

    Args:
        gmf: factor of the server's momentum, over all rounds.
        mu: of the clients' proximal term; if it is not 0, tau is the mean number of steps.
    """

    name = "FedNova"
    differs = "FedML forgets the global momentum after each round"

    def __init__(self, *, gmf: float, mu: float) -> None:
        self.gmf, self.mu = gmf, mu
        self._buffer: State = {}

    def step(self, x: State, replies: Sequence[ClientReply], mean: Mean) -> State:
        """Return x after one normalised step; buffers are averaged."""
        found = [(reply, report) for reply in replies if (report := _report(reply)) is not None]
        if not found:
            return x
        average = mean([reply for reply, _ in found])
        total = sum(reply.examples for reply, _ in found)
        parts = [(reply.examples / total, *report, reply.state) for reply, report in found]
        tau = sum(p * (steps if self.mu else size) for p, size, steps, _ in parts)
        new, moves = dict(average), {}
        for name in sorted(self.trained & x.keys()):
            old = x[name].to(torch.float64)
            step = torch.zeros_like(old)
            for p, size, _, state in parts:
                move = subtract({name: old}, {name: state[name].to(torch.float64)})[name]
                step += tau * p / size * move
            if self.gmf:
                step += self.gmf * self._buffer.get(name, torch.zeros_like(step))
            moves[name] = step
            new[name] = (old - step).to(x[name].dtype)
        if self.gmf and not any(diverged(new[name], x[name]) for name in moves):
            self._buffer = moves  # else the engine keeps x, and the momentum stays
        return new

    def state_dict(self) -> dict[str, Any]:
        """Return the server's momentum."""
        return {"buffer": dict(self._buffer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the server's momentum."""
        self._buffer = dict(state["buffer"])


class LocalFedNova(LocalRule):
    """The client's part.

    A user's own trainer may use ``torch.optim.SGD`` with any options. Without one, `SGDTrainer`
    uses the keys' momentum, dampening, weight decay and Nesterov.

    Args:
        mu: of the proximal term, which is part of the client's gradient.
        options: of the SGD of `SGDTrainer`.
    """

    def __init__(self, *, mu: float, options: Mapping[str, Any]) -> None:
        self.mu = mu
        self._options = dict(options)

    @classmethod
    def of(cls, args: Any) -> LocalFedNova:
        """Return the rule for FedML's keys.

        Raises:
            ConfigError: if a value is out of range, or Nesterov is on without momentum.
        """
        options = {
            "momentum": number(args, "momentum", 0.0),
            "dampening": number(args, "dampening", 0.0),
            "weight_decay": number(args, "wd", number(args, "weight_decay", 0.0)),
            "nesterov": flag(args, "nesterov"),
        }
        if options["nesterov"] and (not options["momentum"] or options["dampening"]):
            raise ConfigError("nesterov: true needs a momentum above 0 and dampening 0")
        return cls(mu=number(args, "mu", 0.0), options=options)

    def trainer(self, model: nn.Module, args: Any) -> SGDTrainer:
        """Return a trainer with the keys' SGD."""
        return SGDTrainer(model, args, self._options)

    @contextmanager
    def around(self, model: nn.Module, local_round: RoundContext) -> Iterator[ReplyExtras]:
        """Count the steps of the client's SGD, and compute their normaliser."""
        parameters = trained_parameters(model, local_round.exchanged)
        start = copied(parameters)
        normaliser = Normaliser(self.mu)

        def term(name: str, parameter: Tensor) -> Tensor | None:
            return self.mu * (parameter.detach() - start[name]) if self.mu else None

        extras = ReplyExtras()
        counted = counting_steps(parameters, normaliser)
        with AddedGradient(parameters, term, check_sgd) as steps, counted:
            yield extras
        steps.check_moved(subtract(parameters, start))
        extras.report.update(normaliser=normaliser.length, steps=steps.steps)


class SGDTrainer(OwnTrainer):
    """FedML's default training with all options of SGD.

    Args:
        model: the client's.
        args: FedML's.
        options: of ``torch.optim.SGD``.
    """

    def __init__(self, model: nn.Module, args: Any, options: Mapping[str, Any]) -> None:
        super().__init__(model, args)
        self._options = dict(options)
        self._optimizer: Optimizer | None = None

    def begin(self, device: Any, args: Any) -> None:
        """Make a new optimizer: momentum does not last beyond a round."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(weights, lr=args.learning_rate, **self._options)

    def step(self, inputs: Any, labels: Any, device: Any, rate: float) -> float:
        """Make one step on one batch, and return its loss."""
        assert self._optimizer is not None
        self._optimizer.zero_grad()
        loss = self.loss(self.model, inputs, labels, device)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return float(loss.detach())


def _report(reply: ClientReply) -> tuple[float, float] | None:
    """Return |a| and the number of steps; log and return None if the client reports neither."""
    found = [reply.report.get(key) for key in ("normaliser", "steps")]
    values = [float(v) for v in found if isinstance(v, int | float) and 1e-6 <= v <= MOST_STEPS]
    if len(values) == len(found):
        return values[0], values[1]
    log.warning(
        "fedpara: FedNova: left out client %s: its report on its steps is %s", reply.client, found
    )
    return None
