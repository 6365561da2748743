"""Runs of Flower that are killed (`harness.processes.killed_runs`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import save_file

import fedpara_plugins_flower
from harness.cells.strategies import STRATEGIES
from harness.flower.apps import Experiment, federate, plugin_apps
from harness.flower.drift_apps import DriftExperiment, drift_apps
from harness.flower.inprocess_grid import InProcessGrid, Sent
from harness.oracles.task import TrainingTask
from harness.processes.killed_runs import Killer, RunRequest, serve

__all__ = ["FlowerRunRequest"]


@dataclass(frozen=True)
class FlowerRunRequest(RunRequest):
    """One run.

    Attributes:
        section: the options of the plugin.
        strategy: a name in `harness.cells.strategies.STRATEGIES`, or of a class of the plugin.
        options: arguments of its constructor.
        rounds: number of rounds.
        epochs: a client's epochs in a round.
    """

    section: Mapping[str, Any] = field(default_factory=dict)
    strategy: str = "fedavg"
    options: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 4
    epochs: int = 1


def run(request: FlowerRunRequest) -> None:
    """Carry out a request."""
    killer = Killer(request)

    def tap(sent: Sent, grid: InProcessGrid) -> None:
        trains = (sent.kind, sent.direction) == ("train", "down")
        killer.passes(trains_in=sent.round if trains else 0)

    task = TrainingTask(rounds=request.rounds, epochs=request.epochs)
    options = dict(request.options)
    if request.strategy in STRATEGIES:
        apps = plugin_apps(Experiment(task, request.strategy, options))
    else:
        kind = getattr(fedpara_plugins_flower, request.strategy)
        apps = drift_apps(DriftExperiment(kind, options, task))
    outcome = federate(apps, request.section, tap=tap)
    request.log.write_text("\n".join(outcome.log))
    save_file({k: v.contiguous() for k, v in outcome.state.items()}, request.output)


if __name__ == "__main__":
    serve(FlowerRunRequest, run)
