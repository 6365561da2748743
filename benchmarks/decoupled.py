"""pFedPara's schedules, the private head and the label counts, on clients of two kinds of skew.

    python benchmarks/decoupled.py [--rounds 20] [--seeds 2]

Ten clients share scikit-learn's digits: with two classes each, or with mildly uneven classes
(Dirichlet, concentration 3). Each has 60 training and about 100 test images of the same mix. An MLP
64-256-10, SGD at rate 0.3 with the gradient's norm clipped at 1, 5 epochs a round in batches of 20,
all clients in every round. Entries are accuracies in percent on the clients' own test images, mean
of the clients and seeds, as soon as the average arrives and before any local training.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedpara_plugins as fedpara
from fedpara_plugins.training import start_round

CLIENTS, CLASSES = 10, 10
TRAIN, TEST = 60, 100
EPOCHS, BATCH, RATE, CLIP = 5, 20, 0.3, 1.0
CONCENTRATION = 3.0

PFEDPARA = {
    **{"method": "pfedpara", "gamma": 0.5, "clip": CLIP},
    **{"variance": "torch", "speed": 0.25, "private_speed": 0.2},
}
DECOUPLED = {**PFEDPARA, "schedule": "decoupled", "first_private_steps": TRAIN // BATCH}
BOTH = {**DECOUPLED, "private_head": True, "label_prior": True}
ROWS: dict[str, dict[str, object]] = {
    "dense, FedAvg": {},
    "dense, FedAvg, counts": {"counts": True},
    "joint": PFEDPARA,
    "joint, counts": {**PFEDPARA, "label_prior": True},
    "decoupled": DECOUPLED,
    "decoupled, head": {**DECOUPLED, "private_head": True},
    "decoupled, counts": {**DECOUPLED, "label_prior": True},
    "decoupled, head, counts": BOTH,
    "decoupled, head, counts, speed 4": {**BOTH, "speed": 4.0},
}


@dataclass(frozen=True)
class Client:
    """One client's images [n, 64] and labels [n]."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Net(nn.Module):
    """The MLP; the dense baseline with label counts adds them to its logits by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 256)
        self.out = nn.Linear(256, CLASSES)
        self.counts: Tensor | float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [n, 10]."""
        logits: Tensor = self.out(torch.relu(self.hidden(x))) + self.counts
        return logits


def deal(skew: str, seed: int) -> list[Client]:
    """Deal the clients' images, none twice, with the same mix of classes to train and to test."""
    digits = load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32)
    images = (pixels - pixels.mean()) / pixels.std()
    labels = torch.tensor(digits.target)
    rng = np.random.default_rng(seed)
    pools = [list(rng.permutation(np.flatnonzero(digits.target == k))) for k in range(CLASSES)]
    clients = []
    for number in range(CLIENTS):
        mix = np.zeros(CLASSES)
        if skew == "two classes":
            mix[[number, (number + 1) % CLASSES]] = 0.5
        else:
            mix = rng.dirichlet(np.full(CLASSES, CONCENTRATION))
        own = []
        for k in rng.choice(CLASSES, TRAIN + TEST, p=mix):
            if pools[k]:  # a class that is used up is left out
                own.append(pools[k].pop())
        chosen = torch.tensor(np.array(own))
        train, test = chosen[:TRAIN], chosen[TRAIN:]
        clients.append(Client((images[train], labels[train]), (images[test], labels[test])))
    return clients


def federate(options: Mapping[str, object], clients: list[Client], rounds: int) -> list[float]:
    """Train, and return the mean accuracy of the received models after each round."""
    by_hand = options.get("counts", False)
    model = Net()
    if "method" in options:
        fedpara.convert(model, init="random", **options)
    spec = fedpara.ModelSpec.of(model)
    shared = copied(fedpara.split(model).shared)
    private = [spec.initial_private() for _ in clients]
    accuracies: list[float] = []
    for _ in range(rounds):
        replies = []
        for number, client in enumerate(clients):
            model.load_state_dict(fedpara.merge(spec, shared, private[number]))
            fedpara.set_label_counts(model, client.train[1])
            model.counts = prior(client.train[1]) if by_hand else 0.0
            start_round(model, previous_steps=EPOCHS * TRAIN // BATCH)
            train(model, client, clip=CLIP if "method" not in options else None)
            parts = fedpara.split(model)
            replies.append(copied(parts.shared))
            private[number] = copied(parts.private)
        shared = {k: torch.stack([reply[k] for reply in replies]).mean(0) for k in shared}
        hits = []
        for number, client in enumerate(clients):
            model.load_state_dict(fedpara.merge(spec, shared, private[number]))
            model.counts = prior(client.train[1]) if by_hand else 0.0
            model.eval()
            with torch.no_grad():
                right = model(client.test[0]).argmax(1) == client.test[1]
            hits.append(right.float().mean().item())
        accuracies.append(100 * sum(hits) / len(hits))
    return accuracies


def train(model: nn.Module, client: Client, *, clip: float | None) -> None:
    """Train as a user would. Factorised models clip by their option, dense ones here."""
    images, labels = client.train
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    model.train()
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()


def prior(labels: Tensor) -> Tensor:
    """Return the logarithms that the option ``label_prior`` adds, for the dense baseline."""
    counts = torch.bincount(labels, minlength=CLASSES)
    return torch.log((counts + 0.1) / (len(labels) + 1))


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the state apart from the model, which goes on to the next client."""
    return {key: value.detach().clone() for key, value in state.items()}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    early = max(1, options.rounds // 4)
    skews = ("two classes", "mild skew")
    heads = [f"{skew}, round {number}" for skew in skews for number in (early, options.rounds)]
    print(f"| method | {' | '.join(heads)} |\n| --- |{' ---: |' * len(heads)}")
    for name, how in ROWS.items():
        cells = []
        for skew in skews:
            runs = []
            for seed in range(options.seeds):
                torch.manual_seed(seed)
                runs.append(federate(how, deal(skew, seed), options.rounds))
            cells += [np.mean([run[at - 1] for run in runs]) for at in (early, options.rounds)]
        print(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |", flush=True)


if __name__ == "__main__":
    main()
