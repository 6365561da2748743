"""Plain loops in torch that compute the expected result of a federated run.

They are written from the algorithms, and use neither Flower nor the adapter nor the user's training
loop. With `harness.oracles.task` they share models and the order of the data, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from harness.oracles.relative_clip import SHARES, clipped, usual_norms
from harness.oracles.replies import PlainReply, Rule, State
from harness.oracles.rules import RULES
from harness.oracles.task import TrainingTask

__all__ = ["RULES", "PlainResult", "Rule", "descend", "descend_clipped", "run_plain_loop"]

Training = Callable[[nn.Module, TrainingTask, int, int, float | None], float]


@dataclass(frozen=True)
class PlainResult:
    """The result of a plain run.

    Attributes:
        initial: the server's state before the first round.
        state: the server's state after the last round, float64; private names hold the server's own
            first values.
        losses: losses of the server's model on its test data before the first round and after each.
        accuracies: accuracies of the same.
        private: each client's private state after the last round it took part in.
        client_accuracy: mean accuracy of the clients' own models at the end on held-out data.
    """

    initial: State
    state: State
    losses: tuple[float, ...]
    accuracies: tuple[float, ...]
    private: Mapping[int, State]
    client_accuracy: float


def run_plain_loop(
    task: TrainingTask,
    build: Callable[[], nn.Module],
    rule: Rule,
    *,
    proximal_mu: float | None = None,
    private_names: Collection[str] = (),
    participants: Sequence[Sequence[int]] | None = None,
    training: Training | None = None,
) -> PlainResult:
    """Train over all rounds.

    Args:
        task: data, rounds, learning rate.
        build: makes the model under the task's seed, dense or converted.
        rule: the server's.
        proximal_mu: FedProx's mu; None for no such term.
        private_names: state that each client keeps and the server never sees.
        participants: the clients of each round; all of them if None.
        training: trains a client's model in place, given model, task, client, round and mu, and
            returns the mean loss; `descend` if None.
    """
    torch.manual_seed(task.seed)
    model = build()
    initial = _copy(model.state_dict())
    state = _double(initial)
    kept: dict[int, State] = {}
    scores = [_score(model, _as(state, initial), task.test_data())]
    for server_round in range(1, task.rounds + 1):
        chosen = participants[server_round - 1] if participants else range(task.clients)
        shared = [key for key in state if key not in private_names]
        replies = []
        for client in chosen:
            own = kept.get(client, {key: initial[key] for key in private_names})
            before = {**_as(state, initial), **own}
            model.load_state_dict(before)
            loss = (training or descend)(model, task, client, server_round, proximal_mu)
            after = rule.client(_double(before), _double(model.state_dict()))
            kept[client] = _as({key: after[key] for key in private_names}, initial)
            part = {key: after[key] for key in shared}
            replies.append(PlainReply(part, task.size(client), loss))
        state.update(rule.server(server_round, {key: state[key] for key in shared}, replies))
        scores.append(_score(model, _as(state, initial), task.test_data()))
    losses, accuracies = zip(*scores, strict=True)
    own_accuracies = [
        _score(model, {**_as(state, initial), **kept.get(client, {})}, task.held_out(client))[1]
        for client in range(task.clients)
    ]
    own_accuracy = sum(own_accuracies) / task.clients  # all hold out equally many
    return PlainResult(initial, state, losses, accuracies, kept, own_accuracy)


def descend_clipped(method: str) -> Training:
    """Return `descend` with the relative clip, for a model of a method with torch's variance."""

    def descend_by_rule(
        model: nn.Module, task: TrainingTask, client: int, server_round: int, mu: float | None
    ) -> float:
        norms = usual_norms(model, method) if method != "none" else {}
        share = SHARES.get(method, 1.0)
        return descend(
            *(model, task, client, server_round, mu),
            held=partial(clipped, rate=task.lr, share=share, norms=norms),
        )

    return descend_by_rule


def descend(
    model: nn.Module,
    task: TrainingTask,
    client: int,
    server_round: int,
    mu: float | None,
    *,
    held: Callable[[str, Tensor, Tensor], Tensor] = lambda name, weight, gradient: gradient,
) -> float:
    """Descend along the gradient by hand; FedProx's term enters as its gradient, mu (w - w0).

    Args:
        model: trained in place.
        task: data and learning rate.
        client: whose batches.
        server_round: the round.
        mu: FedProx's mu; None for no such term.
        held: maps name, weight and gradient to the gradient that a step uses.

    Returns:
        The mean of the batches' losses, FedProx's term included.
    """
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = list(trained.values())
    start = [weight.detach().clone() for weight in weights]
    losses = []
    for images, labels in task.batches(client, server_round):
        loss = nn.functional.cross_entropy(model(images), labels)
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            losses.append(float(loss))
            if mu is not None:
                pairs = zip(weights, start, strict=True)
                losses[-1] += mu / 2 * sum(float(((w - w0) ** 2).sum()) for w, w0 in pairs)
            for name, gradient, origin in zip(trained, gradients, start, strict=True):
                weight = trained[name]
                pull = 0.0 if mu is None else mu * (weight - origin)
                weight.sub_(task.lr * held(name, weight, gradient + pull))
    return sum(losses) / len(losses)


@torch.no_grad()
def _score(
    model: nn.Module, state: Mapping[str, Tensor], data: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    model.load_state_dict(state)
    model.eval()
    images, labels = data
    logits = model(images)
    hits = int((logits.argmax(dim=1) == labels).sum())
    return float(nn.functional.cross_entropy(logits, labels)), hits / len(labels)


def _copy(state: Mapping[str, Tensor]) -> State:
    return {key: value.detach().clone() for key, value in state.items()}


def _double(state: Mapping[str, Tensor]) -> State:
    return {key: value.detach().double().clone() for key, value in state.items()}


def _as(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> State:
    """Cast each tensor to its initial dtype, as for sending; integers are rounded."""
    return {
        key: (value if like[key].is_floating_point() else value.round()).to(like[key].dtype)
        for key, value in state.items()
    }
