"""The runner of studies gives what an app on Flower gives: same weights, same payloads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.cells.flower import GAMMA
from harness.flower.apps import Experiment, federate, plugin_apps
from harness.oracles.task import TrainingTask, train

STUDY = Path(__file__).parents[1] / "benchmarks" / "study"


def _net() -> nn.Module:
    """Build the same model on every side, as one that is pretrained is."""
    torch.manual_seed(5)
    return TrainingTask().net()


@dataclass(frozen=True)
class Pretrained(TrainingTask):
    """A task whose server and clients hold the same model at the start."""

    @property
    def net(self) -> Callable[[], nn.Module]:  # type: ignore[override]
        return _net


TASK = Pretrained(clients=2, rounds=3, epochs=1)


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The runner's modules, which are scripts and no package, with the training of `TASK`."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(STUDY))
    yield import_module("federation")
    for name in set(sys.modules) - before:
        if str(STUDY) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def _run(study: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> Any:
    """Run `TASK` in the runner, and return its federation and its lines."""
    shares = [(torch.zeros(0), torch.zeros(TASK.size(c))) for c in range(TASK.clients)]
    task = import_module("tasks").Task(
        build=TASK.net,
        clients=shares,
        test=TASK.test_data(),
        rate=TASK.lr,
        sampled=TASK.clients,
    )

    def trained(model: nn.Module, share: Any, **_: Any) -> int:
        client = next(c for c, own in enumerate(shares) if own is share)
        batches = list(TASK.batches(client, federation.number))
        train(model, iter(batches), lr=TASK.lr)
        return len(batches)

    monkeypatch.setattr(study, "train", trained)
    setting = import_module("setting").Setting(
        name="row", task="digits", options=options, rounds=TASK.rounds, seed=TASK.seed
    )
    federation = study.Federation(task, setting)
    return federation, [federation.round(task) for _ in range(TASK.rounds)]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "fedpara", "gamma": GAMMA, "codec": "small"},
        {"method": "lowrank", "rank": 4, "base": "frozen", "codec": "small"},
        {"method": "pfedpara", "gamma": GAMMA, "codec": "lossless"},
        {"codec": "small"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_run_is_that_of_the_adapter(
    study: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Weights to rounding: the adapter's mean is a strategy's, in another order of sums.

    A value between two steps of the codec may then go to either.
    """
    federation, lines = _run(study, monkeypatch, options)
    experiment = Experiment(TASK, options={"fraction_evaluate": 0.0})
    # An empty text is the default, which the harness switches off elsewhere.
    section = {f"fedpara.{name}": value for name, value in {**options, "clip": ""}.items()}
    outcome = federate(plugin_apps(experiment), section)
    state: dict[str, Tensor] = outcome.state
    assert state
    for name in state.keys() - federation._spec.private_keys:
        torch.testing.assert_close(federation._state[name], state[name], rtol=1e-4, atol=1e-3)
    assert [line["accuracy"] for line in lines] == pytest.approx(
        [100 * accuracy for accuracy in outcome.accuracies[1:]]
    )
    sent = {
        direction: sum(
            len(payload)
            for each in outcome.sent
            if each.direction == direction
            for payload in each.payloads.values()
        )
        for direction in ("up", "down")
    }
    last = lines[-1]
    # Headers repeat or name what both sides know; that differs by some bytes a message.
    assert last["up"] == pytest.approx(sent["up"], rel=0.02)
    assert last["down"] + last["first"] == pytest.approx(sent["down"], rel=0.15)
