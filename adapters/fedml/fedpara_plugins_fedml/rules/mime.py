"""Mime and MimeLite (Karimireddy et al. 2020, arXiv 2008.03606, algorithm 1).

A round, from x and the statistics s of a base algorithm (`mime_statistics`):

    c = mean over the round's clients of grad f_i(x)                    full gradients; Mime only
    client i: y <- x;  y <- y - lr U(g, s)  with  g = grad(y) - grad(x) + c  on one mini-batch
                                            (MimeLite: g = grad(y));  s does not change
    s <- V(mean of grad f_i(x), s);  x <- mean of y

So Mime exchanges messages with clients twice a round, first for their gradients; MimeLite once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import State, gradient_at, trained_parameters
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.rules.base import (
    ClientReply,
    LocalRule,
    Mean,
    ReplyExtras,
    RoundContext,
    Rule,
)
from fedpara_plugins_fedml.rules.mime_statistics import BaseAlgorithm
from fedpara_plugins_fedml.rules.mime_trainer import MimeTrainer

__all__ = ["LocalMime", "Mime"]

GRADIENT, CORRECTION = "gradient", "correction"


class Mime(Rule):
    """The server's part.

    Args:
        base: the base algorithm.
        lite: whether the optimizer is MimeLite.
        weighting: ``uniform``, as published, or ``examples``.
    """

    name = "Mime"
    differs = "FedML takes the clients' full gradients a round late, summed and clipped"

    def __init__(self, base: BaseAlgorithm, *, lite: bool, weighting: str) -> None:
        self.base, self.lite, self.weighting = base, lite, weighting
        self.prepares = not lite
        self._statistics: dict[str, State] = {}
        self._correction: State = {}
        self._like: State = {}

    def begin(self, server_round: int, x: State, clients: Sequence[str]) -> None:
        """Begin a round, whose gradients are not known yet."""
        self._like = {name: x[name] for name in sorted(self.trained)}
        self._correction = {}

    def prepared(self, replies: Sequence[ClientReply]) -> None:
        """Compute c from the clients' full gradients at x."""
        self._correction = self._gradient(replies)

    def records(self) -> Mapping[str, State]:
        """Return the statistics and, for Mime, c."""
        sent = {**self._statistics, CORRECTION: self._correction}
        return {
            name: {key: value.to(self._like[key].dtype) for key, value in tensors.items()}
            for name, tensors in sent.items()
            if tensors
        }

    def step(self, x: State, replies: Sequence[ClientReply], mean: Mean) -> State:
        """Return the clients' mean, and update the statistics with the gradients at the old x."""
        gradient = self._gradient(replies) if self.lite else self._correction
        if gradient:
            self._statistics = self.base.updated(gradient, self._statistics)
        return mean(self._weighted(replies))

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics."""
        return {"statistics": {kind: dict(part) for kind, part in self._statistics.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the statistics."""
        self._statistics = {kind: dict(part) for kind, part in state["statistics"].items()}

    def _weighted(self, replies: Sequence[ClientReply]) -> list[ClientReply]:
        if self.weighting == "examples":
            return list(replies)
        return [replace(reply, examples=1.0) for reply in replies]

    def _gradient(self, replies: Sequence[ClientReply]) -> State:
        """Return the mean of the clients' full gradients, float64."""
        total: State = {k: torch.zeros_like(v, dtype=torch.float64) for k, v in self._like.items()}
        weights = 0.0
        for reply in self._weighted(replies):
            own = reply.records.get(GRADIENT, {})
            if own.keys() != total.keys() or any(own[k].shape != total[k].shape for k in own):
                log.warning(
                    "fedpara: Mime: the gradient of client %s does not fit the model; left out",
                    reply.client,
                )
                continue
            weights += reply.examples
            for name, value in own.items():
                total[name] += reply.examples * value.to(torch.float64)
        return {name: value / weights for name, value in total.items()} if weights else {}


class LocalMime(LocalRule):
    """The client's part; it makes steps of its own, and therefore needs a trainer of its own.

    Args:
        base: the base algorithm.
        lite: whether the optimizer is MimeLite.
    """

    updates = frozenset({GRADIENT})
    parts = 4  # the model, two statistics of Adam, and c

    def __init__(self, base: BaseAlgorithm, *, lite: bool) -> None:
        self.base, self.lite = base, lite
        self._trainer: MimeTrainer | None = None

    def trainer(self, model: nn.Module, args: Any) -> Any:
        """Return a trainer with Mime's steps, and FedML's own loss and test for the data set."""
        self._trainer = MimeTrainer(model, args, self.base, lite=self.lite)
        return self._trainer

    def prepare(self, model: nn.Module, local_round: RoundContext) -> ReplyExtras:
        """Return the full gradient at x."""
        return ReplyExtras(records={GRADIENT: self._gradient(model, local_round)})

    @contextmanager
    def around(self, model: nn.Module, local_round: RoundContext) -> Iterator[ReplyExtras]:
        """Pass the server's tensors to the trainer; add MimeLite's gradient at x to the reply."""
        trainer = self._own_trainer()
        extras = ReplyExtras()
        if self.lite:
            extras.records[GRADIENT] = self._gradient(model, local_round)
        trainer.set_round(local_round.records, local_round.records.get(CORRECTION, {}))
        yield extras

    def _gradient(self, model: nn.Module, local_round: RoundContext) -> State:
        trainer = self._own_trainer()
        model.to(local_round.device)
        model.train()
        found = gradient_at(
            model,
            trained_parameters(model, local_round.exchanged),
            lambda: trainer.losses(local_round.train_data, local_round.device),
        )
        return {name: value.cpu() for name, value in found.items()}

    def _own_trainer(self) -> MimeTrainer:
        if self._trainer is None:
            raise ConfigError(
                "federated_optimizer: Mime makes steps that no other trainer makes: leave "
                "client_trainer out of FedMLRunner(...), or choose FedAvg, FedProx, FedOpt, "
                "SCAFFOLD, FedDyn or FedNova, which work with any"
            )
        return self._trainer
