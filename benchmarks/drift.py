"""FedAvg, SCAFFOLD and FedDyn under label skew, dense and on factors, with the guard and without.

    python benchmarks/drift.py                    # the table of docs/optimizers.md
    python benchmarks/drift.py --rounds 10 --seeds 0 --methods none --rates 0.1

scikit-learn's digits over 20 clients, labels drawn from Dirichlet(0.3) for each; 5 clients a round,
3 epochs in batches of 10, plain SGD, a CNN without norm layers. Accuracy on 397 images that no
client has: the mean of the last 5 rounds, and the best round; "x 12" is a model that was NaN by
round 12. The plugin's core is used without a framework.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fedpara_plugins as fedpara
from fedpara_plugins.optimizers import (
    ClientUpdate,
    CorrectionState,
    FedDynServer,
    Guard,
    LocalFedDyn,
    LocalScaffold,
    NormHistory,
    ScaffoldServer,
    State,
    finite,
    next_state,
    norm,
    subtract,
    trained_parameters,
)

CLIENTS, A_ROUND, EPOCHS, BATCH, TEST = 20, 5, 3, 10, 397


@dataclass(frozen=True)
class Algorithm:
    """One row of the table."""

    name: str
    label: str
    option: str = "II"
    alpha: float = 0.1
    guard: Guard | None = None


ALGORITHMS = (
    Algorithm("fedavg", "FedAvg"),
    Algorithm("scaffold", "SCAFFOLD, option II"),
    Algorithm("scaffold", "SCAFFOLD, option I", option="I"),
    Algorithm("scaffold", "SCAFFOLD, option II, guard", guard=Guard()),
    Algorithm("scaffold", "SCAFFOLD, option I, guard", option="I", guard=Guard()),
    Algorithm("feddyn", "FedDyn, alpha 0.1"),
    Algorithm("feddyn", "FedDyn, alpha 0.1, guard", guard=Guard()),
    Algorithm("feddyn", "FedDyn, alpha 0.01", alpha=0.01),
    Algorithm("feddyn", "FedDyn, alpha 0.01, guard", alpha=0.01, guard=Guard()),
)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(512, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.conv2(torch.relu(self.conv1(images))))  # [n, 32, 4, 4]
        logits: Tensor = self.fc2(torch.relu(self.fc1(x.flatten(1))))  # [n, 10]
        return logits


@cache
def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images / 16.0).float().unsqueeze(1), torch.tensor(data.target)


@cache
def deal(seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Test images, and each client's: equally many, labels from its own Dirichlet draw."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits()[1]))
    pools = [[i for i in order[TEST:] if digits()[1][i] == label] for label in range(10)]
    wanted = rng.dirichlet([0.3] * 10, CLIENTS)
    clients: list[list[int]] = [[] for _ in range(CLIENTS)]
    for _ in range((len(order) - TEST) // CLIENTS):
        for client in range(CLIENTS):
            left = wanted[client] * [bool(pool) for pool in pools]
            left = left if left.sum() > 0 else np.array([len(pool) for pool in pools], float)
            clients[client].append(pools[rng.choice(10, p=left / left.sum())].pop())
    return order[:TEST], [np.array(own) for own in clients]


@dataclass
class Run:
    """One training from start to end."""

    algorithm: Algorithm
    method: str
    clip: float | None
    rate: float
    rounds: int
    seed: int
    kept: list[CorrectionState] = field(
        default_factory=lambda: [CorrectionState() for _ in range(CLIENTS)]
    )
    bounded: int = 0

    def accuracies(self) -> list[float]:
        torch.manual_seed(self.seed)
        model = Net()
        if self.method != "none":
            options = {"gamma": 0.1, "variance": "torch", "speed": 0.5}
            clip = self.clip or "none"
            model = fedpara.convert(model, method=self.method, clip=clip, **options)
        self.scaffold = ScaffoldServer()
        self.feddyn = FedDynServer(alpha=self.algorithm.alpha)
        norms = NormHistory(self.algorithm.guard) if self.algorithm.guard else None
        x = {k: v.detach().clone() for k, v in model.state_dict().items()}
        rng = np.random.default_rng(self.seed)
        out: list[float] = []
        for server_round in range(1, self.rounds + 1):
            chosen = [int(i) for i in rng.permutation(CLIENTS)[:A_ROUND]]
            collecting = self.algorithm.guard is not None and self.algorithm.guard.collecting(
                server_round, clients=CLIENTS, a_round=A_ROUND
            )
            bound = norms.bound() if norms else None
            replies = self._replies(model, x, chosen, server_round, not collecting, bound)
            if not replies:
                return out
            if norms:
                names = trained_parameters(model)
                norms.add(
                    norm(subtract(r.arrays, {k: x[k] for k in names}).values()) for r in replies
                )
            x = self._next(x, replies, not collecting)
            if not finite(x.values()):
                return out
            model.load_state_dict(x)
            out.append(self._accuracy(model))
        return out

    def _replies(
        self,
        model: nn.Module,
        x: State,
        chosen: Sequence[int],
        server_round: int,
        correct: bool,
        bound: float | None,
    ) -> list[ClientUpdate]:
        replies, changes = [], []
        server = self.feddyn if self.algorithm.name == "feddyn" else self.scaffold
        c = self.scaffold.variate(CLIENTS, x) or None
        for client in chosen:
            model.load_state_dict(x)
            kept = self.kept[client]
            kept.begin(server.sums.accepted(client))
            result = self._local(model, client, server_round, kept.confirmed, c, correct, bound)
            arrays = {k: v.detach().clone() for k, v in model.state_dict().items()}
            if self.algorithm.name == "fedavg":
                replies.append(ClientUpdate(arrays, frozenset(arrays)))
            elif result.own is not None:
                self.bounded += result.kept < 1
                kept.end(result.own, server_round)
                replies.append(ClientUpdate(arrays, frozenset(result.change)))
                changes.append((client, kept.confirmed_round, result.change))
        for (client, since, change), reply in zip(changes, replies, strict=False):
            told = self.feddyn.change(x, reply) if self.algorithm.name == "feddyn" else change
            server.sums.take(
                told, node=client, client=str(client), since=since, server_round=server_round
            )
        return replies

    def _local(self, model, client, server_round, own, c, correct, bound):  # noqa: ANN001, ANN202
        def losses() -> Iterator[tuple[Tensor, int]]:
            for images, labels in batches(self.seed, client, 0, 1):
                yield nn.functional.cross_entropy(model(images), labels), len(labels)

        if self.algorithm.name == "fedavg":
            train(model, self.rate, batches(self.seed, client, server_round, EPOCHS))
            return None
        local: LocalScaffold | LocalFedDyn
        if self.algorithm.name == "scaffold":
            local = LocalScaffold(
                model, own=own, server=c, option=self.algorithm.option,
                losses=losses, correct=correct, bound=bound,
            )  # fmt: skip
        else:
            local = LocalFedDyn(
                model, own=own, alpha=self.algorithm.alpha, correct=correct, bound=bound
            )
        with local:
            train(model, self.rate, batches(self.seed, client, server_round, EPOCHS))
        return local.result

    def _next(self, x: State, replies: Sequence[ClientUpdate], correct: bool) -> State:
        if self.algorithm.name == "scaffold":
            return self.scaffold.step(x, replies)
        if self.algorithm.name == "feddyn":
            return self.feddyn.step(x, replies, clients=CLIENTS, correct=correct)
        return next_state(x, replies, weighting="uniform", then=lambda old, mean, name: mean)

    @torch.no_grad()
    def _accuracy(self, model: nn.Module) -> float:
        images, labels = digits()
        own = deal(self.seed)[0]
        return float((model(images[own]).argmax(1) == labels[own]).float().mean())


def batches(seed: int, client: int, server_round: int, epochs: int) -> Iterator[tuple]:
    images, labels = digits()
    rng = np.random.default_rng([seed, client, server_round])
    for _ in range(epochs):
        order = rng.permutation(deal(seed)[1][client])
        for start in range(0, len(order), BATCH):
            yield images[order[start : start + BATCH]], labels[order[start : start + BATCH]]


def train(model: nn.Module, rate: float, data: Iterator[tuple]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for images, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def shown(runs: Sequence[list[float]], rounds: int) -> str:
    """Render the seeds' means of the last and of the best round, and the first NaN, if any."""
    dead = [len(run) + 1 for run in runs if len(run) < rounds]
    if dead:
        return f"x {min(dead)}" + (f" ({len(dead)} of {len(runs)})" if len(runs) > 1 else "")
    end = float(np.mean([np.mean(run[-5:]) for run in runs]))
    best = float(np.mean([max(run) for run in runs]))
    return f"{100 * end:.1f} / {100 * best:.1f}"


def main() -> None:
    """Print a table for each method."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=["none", "fedpara", "fedpara+clip"])
    parser.add_argument("--rates", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--only", nargs="+", default=[], help="labels to run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for method in options.methods:
        print(f"\n{method}, {options.rounds} rounds, seeds {options.seeds}: last 5 / best, %\n")
        print("| algorithm | " + " | ".join(f"lr {rate:g}" for rate in options.rates) + " |")
        print("| --- |" + " ---: |" * len(options.rates))
        for algorithm in ALGORITHMS:
            if options.only and algorithm.label not in options.only:
                continue
            cells = []
            for rate in options.rates:
                runs = [
                    Run(
                        algorithm,
                        method.split("+")[0],
                        1.0 if "clip" in method else None,
                        rate,
                        options.rounds,
                        seed,
                    )
                    for seed in options.seeds
                ]
                cells.append(shown([run.accuracies() for run in runs], options.rounds))
            print(f"| {algorithm.label} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
