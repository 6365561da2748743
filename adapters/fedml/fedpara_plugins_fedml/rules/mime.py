"""Mime and MimeLite (Karimireddy et al. 2020, arXiv 2008.03606, algorithm 1).

A round, from x and the statistics s of a base algorithm (`mime_statistics`):

    c = mean over the round's clients of grad f_i(x)                    full gradients; Mime only
    client i: y <- x;  y <- y - lr U(g, s)  with  g = grad(y) - grad(x) + c  on one mini-batch
                                            (MimeLite: g = grad(y));  s does not change
    s <- V(mean of grad f_i(x), s);  x <- mean of y

So Mime needs the clients twice a round, first for their gradients; MimeLite once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import State, gradient_at, trained_parameters
from fedpara_plugins_fedml.rules.base import ClientReply, LocalRule, LocalWork, Mean, Rule, Visit
from fedpara_plugins_fedml.rules.mime_statistics import Base
from fedpara_plugins_fedml.rules.mime_trainer import MimeTrainer

__all__ = ["LocalMime", "Mime"]

log = logging.getLogger("fedpara.fedml")

GRADIENT, CORRECTION = "gradient", "correction"


class Mime(Rule):
    """The server's half.

    Args:
        base: algorithm.
        lite: MimeLite.
        weighting: ``uniform``, as published, or ``examples``.
    """

    name = "Mime"
    mends = "FedML takes the clients' full gradients a round late, summed and clipped"

    def __init__(self, base: Base, *, lite: bool, weighting: str) -> None:
        self.base, self.lite, self.weighting = base, lite, weighting
        self.prepares = not lite
        self._statistics: dict[str, State] = {}
        self._correction: State = {}
        self._like: State = {}

    def begin(self, server_round: int, x: State, clients: Sequence[str]) -> None:
        """Nothing is known of this round's gradients yet."""
        self._like = {name: x[name] for name in sorted(self.trained)}
        self._correction = {}

    def prepared(self, answers: Sequence[ClientReply]) -> None:
        """The clients' full gradients at x, for c."""
        self._correction = self._gradient(answers)

    def records(self) -> Mapping[str, State]:
        """The statistics and, for Mime, c."""
        sent = {**self._statistics, CORRECTION: self._correction}
        return {
            name: {key: value.to(self._like[key].dtype) for key, value in tensors.items()}
            for name, tensors in sent.items()
            if tensors
        }

    def step(self, x: State, answers: Sequence[ClientReply], mean: Mean) -> State:
        """The clients' mean; and the statistics with the gradients at the old x."""
        gradient = self._gradient(answers) if self.lite else self._correction
        if gradient:
            self._statistics = self.base.updated(gradient, self._statistics)
        return mean(self._weighed(answers))

    def state_dict(self) -> dict[str, Any]:
        """The statistics."""
        return {"statistics": {kind: dict(part) for kind, part in self._statistics.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`."""
        self._statistics = {kind: dict(part) for kind, part in state["statistics"].items()}

    def _weighed(self, answers: Sequence[ClientReply]) -> list[ClientReply]:
        if self.weighting == "examples":
            return list(answers)
        return [replace(answer, examples=1.0) for answer in answers]

    def _gradient(self, answers: Sequence[ClientReply]) -> State:
        """The mean of the clients' full gradients, float64."""
        total: State = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in self._like.items()}
        whole = 0.0
        for answer in self._weighed(answers):
            own = answer.records.get(GRADIENT, {})
            if own.keys() != total.keys() or any(own[k].shape != total[k].shape for k in own):
                log.warning(
                    "fedpara: Mime: the gradient of client %s does not fit the model; left out",
                    answer.client,
                )
                continue
            whole += answer.examples
            for name, value in own.items():
                total[name] += answer.examples * value.to(torch.float64)
        return {name: value / whole for name, value in total.items()} if whole else {}


class LocalMime(LocalRule):
    """The client's half; it needs steps of its own, hence a trainer of its own.

    Args:
        base: algorithm.
        lite: MimeLite.
    """

    updates = frozenset({GRADIENT})

    def __init__(self, base: Base, *, lite: bool) -> None:
        self.base, self.lite = base, lite
        self._trainer: MimeTrainer | None = None

    def trainer(self, model: nn.Module, args: Any) -> Any:
        """Mime's steps, with FedML's own loss and test for the data set."""
        self._trainer = MimeTrainer(model, args, self.base, lite=self.lite)
        return self._trainer

    def prepare(self, model: nn.Module, visit: Visit) -> LocalWork:
        """The full gradient at x."""
        return LocalWork(records={GRADIENT: self._gradient(model, visit)})

    @contextmanager
    def around(self, model: nn.Module, visit: Visit) -> Iterator[LocalWork]:
        """Tell the trainer what the server sent; MimeLite's gradient at x."""
        trainer = self._own()
        work = LocalWork()
        if self.lite:
            work.records[GRADIENT] = self._gradient(model, visit)
        trainer.set_round(visit.records, visit.records.get(CORRECTION, {}))
        yield work

    def _gradient(self, model: nn.Module, visit: Visit) -> State:
        trainer = self._own()
        model.to(visit.device)
        model.train()
        found = gradient_at(
            model,
            trained_parameters(model, visit.exchanged),
            lambda: trainer.losses(visit.train_data, visit.device),
        )
        return {name: value.cpu() for name, value in found.items()}

    def _own(self) -> MimeTrainer:
        if self._trainer is None:
            raise ConfigError(
                "federated_optimizer: Mime makes steps that no other trainer makes: leave "
                "client_trainer out of FedMLRunner(...), or choose FedAvg, FedProx, FedOpt, "
                "SCAFFOLD, FedDyn or FedNova, which work with any"
            )
        return self._trainer
