"""What absence costs on a real training, and what ten thousand clients take in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara

ROUNDS, AWAY_FROM, AWAY_TO = 24, 10, 20
MEMORY = 2_000_000
PER_CLIENT = 1500


def task(seed):
    """Images in four clusters a class, which a linear model cannot tell apart."""
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, 64, generator=torch.Generator().manual_seed(99))
    which = torch.randint(0, 40, (2000,), generator=draw)
    return centres[which] + 0.7 * torch.randn(2000, 64, generator=draw), which % 10


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    net.append(nn.Linear(256, 10))
    return fedpara.convert(net, method="fedpara", gamma=0.1, init="seeded", clip=1.0)


def trained(model, state, images, labels):
    model.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in torch.arange(len(labels)).split(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def federated(exchange):
    """Bytes of one client that is always there and of one that was away, and the accuracy."""
    images, labels = task(0)
    shares = list(zip(images.chunk(10), labels.chunk(10), strict=True))
    sizes = {}
    for now in range(ROUNDS):
        results = []
        for who in range(4):
            # Client 0 is there in every round, the others take turns, "away" looks in twice.
            name = 0 if who == 0 else 1 + (3 * now + who) % 9
            got = exchange.state
            if exchange.downlink is not None:
                messages, received = exchange.round(str(name))
                got = received.tensors
                sizes[name, now] = len(messages[-1].payload)
            results.append(trained(exchange.model, got, *shares[name]))
        if exchange.downlink is not None and now in (AWAY_FROM, AWAY_TO):
            sizes["away", now] = len(exchange.round("away")[0][-1].payload)
        exchange.state = {
            name: torch.stack([one[name] for one in results]).mean(0) for name in results[0]
        }
    exchange.model.load_state_dict(exchange.state)
    images, labels = task(1)
    with torch.no_grad():
        right = (exchange.model(images).argmax(1) == labels).float().mean()
    return sizes, float(right)


@pytest.fixture(scope="module")
def uncoded_accuracy():
    import types

    model = network()
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return federated(types.SimpleNamespace(model=model, state=state, downlink=None))[1]


@pytest.mark.parametrize(
    ("name", "codec", "options", "most"),
    [
        ("per client", "small", {}, 1.3),
        ("per client", "balanced", {}, 1.3),
        ("per client", "int8", {}, 1.3),
        ("grid", "small", {}, 3.0),
        ("grid", "balanced", {}, 3.0),
    ],
)
def test_ten_rounds_away(helpers, uncoded_accuracy, name, codec, options, most):
    exchange = helpers.Exchange(helpers.SCHEMES[name](**options), codec=codec, model=network())
    sizes, accuracy = federated(exchange)
    ratio = sizes["away", AWAY_TO] / sizes[0, AWAY_TO]
    assert ratio <= most
    dense = 4 * sum(value.numel() for value in exchange.state.values())
    assert max(sizes.values()) < dense / 2, "a full float32 model was sent"
    assert accuracy > uncoded_accuracy - 0.03 > 0.6


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads VmRSS from /proc")
@pytest.mark.parametrize(
    ("scheme", "states"),
    [pytest.param("per client", 10_000, marks=pytest.mark.long), ("grid", 32)],
)
def test_memory_with_ten_thousand_clients(scheme, states, tmp_path):
    """The stated bound: `memory_bytes`, and 1.5 kB a client. The states take 44 MB in all."""
    root = Path(fedpara.__file__).parents[1]
    done = subprocess.run(
        [
            sys.executable,
            str(Path(__file__).with_name("memory_process.py")),
            *(scheme, str(tmp_path), "10000", str(MEMORY)),
        ],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        check=True,
        text=True,
    )
    found = json.loads(done.stdout)
    assert found["states"] == states
    assert found["grown"] < MEMORY + 10_000 * PER_CLIENT
