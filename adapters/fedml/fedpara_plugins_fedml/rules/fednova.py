"""FedNova (Wang et al. 2020, arXiv 2007.07481): clients' steps, normalised, then averaged.

Client i, with tau_i steps from x to y_i and |a_i| (see `UnitWay`): d_i = (x - y_i) / |a_i|.
Server, with p_i the clients' shares of the examples:

    step = tau * sum of p_i d_i      tau = sum of p_i |a_i|, or of p_i tau_i with a proximal term
    b <- gmf b + step                x <- x - b

|a_i| is how far, in units of the learning rate, the client's optimizer would have gone with
gradients of 1: tau_i for plain SGD, the sums of the paper for momentum, and for the proximal term.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import (
    AddedGradient,
    copied,
    finite,
    observe_steps,
    subtract,
    trained_parameters,
)
from fedpara_plugins_fedml.rules.base import Answer, LocalRule, LocalWork, Mean, Rule, State, Visit
from fedpara_plugins_fedml.rules.keys import flag, number
from fedpara_plugins_fedml.rules.own_trainer import OwnTrainer

__all__ = ["FedNova", "LocalFedNova", "SGDTrainer", "UnitWay"]

log = logging.getLogger("fedpara.fedml")


class FedNova(Rule):
    """The server's half.

    Args:
        gmf: factor of the server's momentum, over all rounds.
        mu: of the clients' proximal term; not 0 makes tau the mean number of steps.
    """

    name = "FedNova"
    mends = "FedML forgets the global momentum after each round"

    def __init__(self, *, gmf: float, mu: float) -> None:
        self.gmf, self.mu = gmf, mu
        self._buffer: State = {}

    def step(self, x: State, answers: Sequence[Answer], mean: Mean) -> State:
        """One normalised step; buffers are averaged."""
        told = [(answer, report) for answer in answers if (report := _report(answer)) is not None]
        if not told:
            return x
        average = mean([answer for answer, _ in told])
        whole = sum(answer.examples for answer, _ in told)
        parts = [(a.examples / whole, *report, a.state) for a, report in told]
        tau = sum(p * (steps if self.mu else size) for p, size, steps, _ in parts)
        new, moves = dict(average), {}
        for name in sorted(self.trained & x.keys()):
            old = x[name].to(torch.float64)
            step = torch.zeros_like(old)
            for p, size, _, state in parts:
                step += tau * p / size * (old - state[name].to(torch.float64))
            if self.gmf:
                step += self.gmf * self._buffer.get(name, torch.zeros_like(step))
            moves[name] = step
            new[name] = (old - step).to(x[name].dtype)
        if self.gmf and finite(new.values()):  # else the engine keeps x, and this its momentum
            self._buffer = moves
        return new

    def state_dict(self) -> dict[str, Any]:
        """The server's momentum."""
        return {"buffer": dict(self._buffer)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self._buffer = dict(state["buffer"])


class LocalFedNova(LocalRule):
    """The client's half.

    A user's own trainer may use ``torch.optim.SGD`` as it likes; without one, the keys' momentum,
    dampening, weight decay and Nesterov are those of `SGDTrainer`.

    Args:
        mu: of the proximal term, which is part of the client's gradient.
        options: of the SGD of `SGDTrainer`.
    """

    def __init__(self, *, mu: float, options: Mapping[str, Any]) -> None:
        self.mu = mu
        self._options = dict(options)

    @classmethod
    def of(cls, args: Any) -> LocalFedNova:
        """From FedML's keys.

        Raises:
            ConfigError: a value out of range, or Nesterov without momentum.
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
        """With the keys' SGD."""
        return SGDTrainer(model, args, self._options)

    @contextmanager
    def around(self, model: nn.Module, visit: Visit) -> Iterator[LocalWork]:
        """Count the steps of the client's SGD and what they amount to."""
        parameters = trained_parameters(model, visit.exchanged)
        start = copied(parameters)
        way = UnitWay(self.mu)

        def pull(name: str, parameter: Tensor) -> Tensor | None:
            return self.mu * (parameter.detach() - start[name]) if self.mu else None

        work = LocalWork()
        with AddedGradient(parameters, pull, _check_sgd) as steps, _stepping(parameters, way):
            yield work
        steps.check_moved(subtract(parameters, start))
        work.report.update(normaliser=way.length, steps=steps.steps)


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
        """A new optimizer: momentum does not outlive a round."""
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.SGD(weights, lr=args.learning_rate, **self._options)

    def step(self, inputs: Any, labels: Any, device: Any, rate: float) -> float:
        """One step."""
        assert self._optimizer is not None
        self._optimizer.zero_grad()
        loss = self.loss(self.model, inputs, labels, device)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return float(loss.detach())


class UnitWay:
    """How far gradients of 1 would have taken the client, in units of its first learning rate.

    Weight decay is part of the gradient, as in the paper.

    Args:
        mu: of the proximal term.

    Attributes:
        length: |a|.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self.length = 0.0
        self._unit = 0.0
        self._buffers: weakref.WeakKeyDictionary[Optimizer, float] = weakref.WeakKeyDictionary()

    def step(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        """Go with one step of SGD.

        Args:
            optimizer: that makes it.
            groups: of it that hold parameters which count.

        Raises:
            ConfigError: groups that differ, so that there is no one number.
        """
        kinds = {tuple(float(group[key]) for key in COUNTS) for group in groups}
        if len(kinds) > 1:
            raise ConfigError(
                f"FedNova normalises a client's step by one number, which there is only if all "
                f"groups of its SGD have the same {', '.join(COUNTS)}; they have {sorted(kinds)}"
            )
        for rate, momentum, dampening, nesterov in kinds:
            self._unit = self._unit or rate
            gradient = 1.0 - self.mu * self._unit * self.length
            move = gradient
            if momentum:
                before = self._buffers.get(optimizer)
                buffer = (
                    gradient if before is None else momentum * before + (1 - dampening) * gradient
                )
                self._buffers[optimizer] = buffer
                move = gradient + momentum * buffer if nesterov else buffer
            self.length += (rate / self._unit if self._unit else 0.0) * move


COUNTS = ("lr", "momentum", "dampening", "nesterov")
"""What of a group of SGD enters |a|."""


def _check_sgd(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.SGD):
        raise ConfigError(
            f"FedNova's normaliser is that of torch.optim.SGD, and the training loop uses "
            f"{type(optimizer).__name__}; use SGD, or FedAvg or FedDyn, which bear any optimizer"
        )


@contextmanager
def _stepping(parameters: Mapping[str, Tensor], way: UnitWay) -> Iterator[None]:
    """Tell ``way`` each step of an optimizer that holds any of the parameters."""
    known = {id(parameter) for parameter in parameters.values()}

    def hook(optimizer: Optimizer) -> None:
        held = [g for g in optimizer.param_groups if any(id(p) in known for p in g["params"])]
        if any(p.grad is not None for g in held for p in g["params"] if id(p) in known):
            way.step(optimizer, held)

    with observe_steps(hook):
        yield


def _report(answer: Answer) -> tuple[float, float] | None:
    """|a| and the number of steps; None, with a line in the log, if a client told neither."""
    found = [answer.report.get(key) for key in ("normaliser", "steps")]
    values = [float(v) for v in found if isinstance(v, int | float) and math.isfinite(v) and v > 0]
    if len(values) == len(found):
        return values[0], values[1]
    log.warning(
        "fedpara: FedNova: left out client %s: it says of its steps %s", answer.client, found
    )
    return None
