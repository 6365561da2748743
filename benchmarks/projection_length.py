"""Losses after projected updates of several lengths, for rounds of any size.

``python benchmarks/projection_length.py`` (scikit-learn's digits; a minute). For each method and
each round of training it prints |V| / |W|, the loss before and after training, and after the
projection: as it is done, and with the rescaled step at fixed shares of its length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from unittest import mock

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fedpara_plugins as fedpara
from fedpara_plugins.exchange import DenseRound
from fedpara_plugins.factors.projection import update

SHARES = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
ROUNDS = ((15, 0.0), (150, 0.0), (45, 0.9), (150, 0.9))
"""Steps, and the momentum of SGD at a rate of 0.1."""


def digits() -> tuple[Tensor, Tensor]:
    """Load all images, shape (1797, 64), and their labels."""
    found = load_digits()
    pictures = torch.tensor(found.images, dtype=torch.float32).flatten(1) / 16
    return pictures, torch.tensor(found.target).long()


def network() -> nn.Module:
    """Build a multilayer perceptron."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def lines() -> Iterator[str]:
    """Yield one line for each method and round."""
    x, y = digits()

    def loss() -> float:
        with torch.no_grad():
            return float(cross_entropy(plain(x), y))

    for steps, momentum in ROUNDS:
        for method in ("lowrank", "fedpara", "pfedpara"):
            plain = network()
            model = fedpara.convert(copy.deepcopy(plain), method=method, gamma=0.1, init="seeded")
            spec = fedpara.ModelSpec.of(model)
            start = spec.dense_state(model.state_dict())
            plain.load_state_dict(start)
            losses = [loss()]
            optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=momentum)
            for step in range(steps):
                batch = slice(32 * (step % 15), 32 * (step % 15) + 32)
                optimizer.zero_grad()
                cross_entropy(plain(x[batch]), y[batch]).backward()
                optimizer.step()
            losses.append(loss())
            trained = {name: value.clone() for name, value in plain.state_dict().items()}
            moved = max(
                float((trained[name] - start[name]).norm() / start[name].norm())
                for name in spec.weights
            )
            for share in (None, *SHARES):
                fixed = update._step_length if share is None else lambda *_, share=share: share
                with mock.patch.object(update, "_step_length", fixed):
                    after = DenseRound(spec, model.state_dict()).to_factors(trained)
                plain.load_state_dict(spec.dense_state(after))
                losses.append(loss())
            cells = [method, str(steps), f"{momentum:g}", f"{moved:.2f}"]
            yield f"| {' | '.join([*cells, *(f'{value:.3g}' for value in losses)])} |"


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    heads = ["method", "steps", "momentum", "most |V| / |W|", "before", "trained", "projected"]
    heads += [f"at {share:g}" for share in SHARES]
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for line in lines():
        print(line, flush=True)


if __name__ == "__main__":
    main()
