"""Plain loops in torch that compute what a federated run must come to.

Written from the algorithms, without Flower, without the adapter, and without the user's training
loop of `harness.task` (models and the order of the data are shared with it, nothing else).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from harness.task import Task

__all__ = ["RULES", "Reference", "Rule", "federated"]

State = dict[str, Tensor]


class Rule(Protocol):
    """What the server makes of the clients' average."""

    def __call__(self, server_round: int, current: State, average: State) -> State:
        """The next global state; both arguments and the result are float64."""


class FedAvgRule:
    """The average itself."""

    def __call__(self, server_round: int, current: State, average: State) -> State:
        return average


@dataclass
class FedAdamRule:
    """Flower's FedAdam: d = average - x, and with t = round + 1

    m = b1 m + (1 - b1) d,  v = b2 v + (1 - b2) d²,
    x' = x + eta sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + tau)

    so the correction counts one round more than have happened, m and v start at zero, and tau
    stands outside the root, not corrected.
    """

    eta: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    m: State = field(default_factory=dict)
    v: State = field(default_factory=dict)

    def __call__(self, server_round: int, current: State, average: State) -> State:
        t = server_round + 1
        rate = self.eta * (1 - self.beta_2**t) ** 0.5 / (1 - self.beta_1**t)
        new = {}
        for key, x in current.items():
            d = average[key] - x
            self.m[key] = self.beta_1 * self.m.get(key, 0.0) + (1 - self.beta_1) * d
            self.v[key] = self.beta_2 * self.v.get(key, 0.0) + (1 - self.beta_2) * d**2
            new[key] = x + rate * self.m[key] / (self.v[key].sqrt() + self.tau)
        return new


RULES: Mapping[str, Callable[..., Rule]] = {"fedavg": FedAvgRule, "fedadam": FedAdamRule}


@dataclass(frozen=True)
class Reference:
    """How a run comes out.

    Attributes:
        initial: the server's state before the first round.
        state: after the last one, float64; private names hold the server's own first values.
        losses: of the server's model on its test data, before the first round and after each.
        accuracies: the same.
        private: each client's private state after the last round it took part in.
    """

    initial: State
    state: State
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    private: Mapping[int, State]


def federated(
    task: Task,
    build: Callable[[], nn.Module],
    rule: Rule,
    *,
    proximal_mu: float | None = None,
    private_names: Collection[str] = (),
    participants: Sequence[Sequence[int]] | None = None,
) -> Reference:
    """Train over all rounds.

    Args:
        task: data, rounds, learning rate.
        build: makes the model under the task's seed, dense or converted.
        rule: the server's.
        proximal_mu: FedProx's mu; None for no such term.
        private_names: state that each client keeps and the server never sees.
        participants: the clients of each round; all of them if None.
    """
    torch.manual_seed(task.seed)
    model = build()
    initial = _copy(model.state_dict())
    state = {key: value.double() for key, value in initial.items()}
    kept: dict[int, State] = {}
    scores = [_score(model, state, task)]
    for server_round in range(1, task.rounds + 1):
        chosen = participants[server_round - 1] if participants else range(task.clients)
        total = sum(task.size(client) for client in chosen)
        average = {key: torch.zeros_like(value) for key, value in state.items()}
        for client in chosen:
            own = kept.get(client, {key: initial[key] for key in private_names})
            model.load_state_dict({**_as(state, initial), **own})
            _descend(model, task, client, server_round, proximal_mu)
            after = _copy(model.state_dict())
            kept[client] = {key: after[key] for key in private_names}
            for key in average:
                average[key] += after[key].double() * (task.size(client) / total)
        shared = [key for key in state if key not in private_names]
        part = ({key: whole[key] for key in shared} for whole in (state, average))
        state.update(rule(server_round, *part))
        scores.append(_score(model, _as(state, initial), task))
    losses, accuracies = zip(*scores, strict=True)
    return Reference(initial, state, losses, accuracies, kept)


def _descend(
    model: nn.Module, task: Task, client: int, server_round: int, mu: float | None
) -> None:
    """Gradient descent by hand; FedProx's term enters as its gradient, mu (w - w0)."""
    model.train()
    weights = list(model.parameters())
    start = [weight.detach().clone() for weight in weights]
    for images, labels in task.batches(client, server_round):
        loss = nn.functional.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for weight, gradient, origin in zip(weights, gradients, start, strict=True):
                pull = 0.0 if mu is None else mu * (weight - origin)
                weight.sub_(task.lr * (gradient + pull))


@torch.no_grad()
def _score(model: nn.Module, state: Mapping[str, Tensor], task: Task) -> tuple[float, float]:
    model.load_state_dict(state)
    model.eval()
    images, labels = task.test_data()
    logits = model(images)
    hits = int((logits.argmax(dim=1) == labels).sum())
    return float(nn.functional.cross_entropy(logits, labels)), hits / len(labels)


def _copy(state: Mapping[str, Tensor]) -> State:
    return {key: value.detach().clone() for key, value in state.items()}


def _as(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """What is sent: each tensor in the dtype it had at first, integers rounded."""
    return {
        key: (value if like[key].is_floating_point() else value.round()).to(like[key].dtype)
        for key, value in state.items()
    }
