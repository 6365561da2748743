"""SCAFFOLD and FedDyn as in their papers, in plain loops: gradients by hand, no hooks.

Of the plugin only the conversion of the model is used. Models and the order of the data are those
of `harness.oracles.task`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.cells.strategies import PLUGIN_STRATEGIES
from harness.oracles.cell_model import SLOW, cell_model
from harness.oracles.task import TrainingTask

__all__ = ["DriftResult", "feddyn", "run_published", "scaffold"]

State = dict[str, Tensor]
Weights = Callable[[int], float]


@dataclass
class DriftResult:
    """The result of a plain run of SCAFFOLD or FedDyn.

    Attributes:
        initial: the server's state before the first round.
        state: the server's state after the last round, float64; private names hold the server's own
            first values.
        mean: SCAFFOLD's c or FedDyn's h.
        own: each client's variate or dual.
        private: each client's private state after its last round.
        losses: losses of the server's model on its test data before the first round and after each.
        accuracies: accuracies of the same.
        first_replies: the clients' states of the first round.
    """

    initial: State
    state: State
    mean: State
    own: dict[int, State]
    private: dict[int, State]
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    first_replies: dict[int, State] = field(default_factory=dict)


@dataclass
class _Federation:
    """The parts that both algorithms share: model, clients' private state, average."""

    task: TrainingTask
    model: nn.Module
    private_names: frozenset[str]
    participants: Sequence[Sequence[int]] | None
    weights: Weights

    def start(self) -> DriftResult:
        initial = _copy(self.model.state_dict())
        state = {k: v.double() for k, v in initial.items()}
        zero = {k: torch.zeros_like(state[k]) for k in self.names()}
        own = {i: _copy(zero) for i in range(self.task.clients)}
        private = {i: {k: initial[k] for k in self.private_names} for i in range(self.task.clients)}
        out = DriftResult(initial, state, zero, own, private)
        self.score(out)
        return out

    def names(self) -> list[str]:
        return [n for n, _ in self.model.named_parameters() if n not in self.private_names]

    def chosen(self, server_round: int) -> Sequence[int]:
        return (
            self.participants[server_round - 1] if self.participants else range(self.task.clients)
        )

    def load(self, out: DriftResult, client: int) -> None:
        self.model.load_state_dict({**_as(out.state, out.initial), **out.private[client]})
        self.model.train()

    def descend(
        self, client: int, server_round: int, added: Callable[[str, Tensor], Tensor]
    ) -> int:
        parameters = dict(self.model.named_parameters())
        steps = 0
        for batch in self.task.batches(client, server_round):
            gradients = self.gradients(batch)
            with torch.no_grad():
                for name, weight in parameters.items():
                    whole = gradients[name]
                    if name in self.names():
                        whole = whole + added(name, weight)
                    weight.sub_(self.task.lr * whole)
            steps += 1
        return steps

    def gradients(self, batch: tuple[Tensor, Tensor]) -> State:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        parameters = dict(self.model.named_parameters())
        return dict(
            zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True)
        )

    def reply(self, out: DriftResult, client: int, server_round: int) -> State:
        after = _copy(self.model.state_dict())
        out.private[client] = {k: after[k] for k in self.private_names}
        if server_round == 1:
            out.first_replies[client] = after
        return after

    def mean(self, replies: dict[int, State], name: str) -> Tensor:
        total = sum(self.weights(i) for i in replies)
        zero = torch.zeros_like(next(iter(replies.values()))[name].double())
        return sum((self.weights(i) / total * y[name].double() for i, y in replies.items()), zero)

    def share(self, client: int) -> float:
        """Return a client's share of the sum over all clients."""
        return self.weights(client) / sum(self.weights(i) for i in range(self.task.clients))

    @torch.no_grad()
    def score(self, out: DriftResult) -> None:
        self.model.load_state_dict(_as(out.state, out.initial))
        self.model.eval()
        images, labels = self.task.test_data()
        logits = self.model(images)
        out.losses.append(float(nn.functional.cross_entropy(logits, labels)))
        out.accuracies.append(int((logits.argmax(dim=1) == labels).sum()) / len(labels))


def scaffold(
    task: TrainingTask,
    build: Callable[[], nn.Module],
    *,
    private_names: Collection[str] = (),
    participants: Sequence[Sequence[int]] | None = None,
    option: Literal["I", "II"] = "II",
    rate: float = 1.0,
    weights: Weights = lambda client: 1.0,
) -> DriftResult:
    """Run SCAFFOLD: arXiv 1910.06378, algorithm 1.

    Args:
        task: data, rounds, the clients' learning rate.
        build: makes the model under the task's seed.
        private_names: state that each client keeps; it has no variates.
        participants: the clients of each round; all of them if None.
        option: how the new variate is made.
        rate: the server's learning rate.
        weights: weights of the clients; the paper's are equal.
    """
    run = _begun(task, build, private_names, participants, weights)
    out, names = run.start(), run.names()
    c = out.mean
    for server_round in range(1, task.rounds + 1):
        replies, new = {}, {}
        for i in run.chosen(server_round):
            run.load(out, i)
            x, c_i = _copy(run.model.state_dict()), out.own[i]
            at_x: State = {}
            if option == "I":
                batches = list(task.batches(i, server_round))
                whole = sum(len(labels) for _, labels in batches)
                at_x = {k: torch.zeros_like(c_i[k]) for k in names}
                for images, labels in batches:
                    part = run.gradients((images, labels))
                    at_x = {k: g + len(labels) / whole * part[k] for k, g in at_x.items()}
                run.load(out, i)  # whose buffers the passes have moved
            steps = run.descend(i, server_round, lambda k, w, c_i=c_i: (c[k] - c_i[k]).float())
            y = run.reply(out, i, server_round)
            if option == "II":
                at_x = {
                    k: c_i[k] - c[k] + (x[k].double() - y[k].double()) / (steps * task.lr)
                    for k in names
                }
            replies[i], new[i] = y, at_x
        for k in out.state:
            if k not in run.private_names:
                mean = run.mean(replies, k)
                x_k = out.state[k]
                out.state[k] = x_k + rate * (mean - x_k) if k in names else mean
        for i, variate in new.items():
            for k in names:
                c[k] = c[k] + run.share(i) * (variate[k] - out.own[i][k])
            out.own[i] = variate
        run.score(out)
    return out


def feddyn(
    task: TrainingTask,
    build: Callable[[], nn.Module],
    *,
    alpha: float,
    private_names: Collection[str] = (),
    participants: Sequence[Sequence[int]] | None = None,
    weights: Weights = lambda client: 1.0,
) -> DriftResult:
    """Run FedDyn: arXiv 2111.04263, algorithm 1, with gradient descent for the argmin.

    Arguments are those of `scaffold`.
    """
    run = _begun(task, build, private_names, participants, weights)
    out, names = run.start(), run.names()
    h = out.mean
    for server_round in range(1, task.rounds + 1):
        replies = {}
        for i in run.chosen(server_round):
            run.load(out, i)
            x, dual = _copy(run.model.state_dict()), out.own[i]
            run.descend(
                i,
                server_round,
                lambda k, w, x=x, dual=dual: alpha * (w - x[k]) - dual[k].float(),
            )
            replies[i] = run.reply(out, i, server_round)
        for i, y in replies.items():
            for k in names:
                step = alpha * (y[k].double() - out.state[k])
                out.own[i][k] = out.own[i][k] - step
                h[k] = h[k] - run.share(i) * step
        for k in out.state:
            if k not in run.private_names:
                mean = run.mean(replies, k)
                out.state[k] = mean - h[k] / alpha if k in names else mean
        run.score(out)
    return out


def _begun(
    task: TrainingTask,
    build: Callable[[], nn.Module],
    private_names: Collection[str],
    participants: Sequence[Sequence[int]] | None,
    weights: Weights,
) -> _Federation:
    torch.manual_seed(task.seed)
    return _Federation(task, build(), frozenset(private_names), participants, weights)


def _copy(state: Any) -> State:
    return {key: value.detach().clone() for key, value in state.items()}


def _as(state: State, like: State) -> State:
    """Cast each tensor to its initial dtype, as for sending; integers are rounded."""
    return {
        key: (value if like[key].is_floating_point() else value.round()).to(like[key].dtype)
        for key, value in state.items()
    }


def run_published(
    strategy: str, method: str, task: TrainingTask, private_names: Collection[str]
) -> DriftResult:
    """Run the algorithm that a cell of `PLUGIN_STRATEGIES` must match."""

    def build() -> nn.Module:
        return cell_model(method, task.model, **SLOW)

    if strategy == "scaffold":
        return scaffold(task, build, private_names=private_names)
    return feddyn(task, build, private_names=private_names, **PLUGIN_STRATEGIES[strategy].options)
