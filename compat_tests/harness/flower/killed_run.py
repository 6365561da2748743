"""Flower's runs that are killed (`harness.processes.killed_runs`)."""

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
from harness.oracles.task import Task
from harness.processes.killed_runs import Killer, Order, serve

__all__ = ["FlowerOrder"]


@dataclass(frozen=True)
class FlowerOrder(Order):
    """One run.

    Attributes:
        section: the options of the plugin.
        strategy: a name in `harness.cells.strategies.STRATEGIES`, or of a class of the plugin.
        options: of its constructor.
        rounds: of the run.
        epochs: of a client in a round.
    """

    section: Mapping[str, Any] = field(default_factory=dict)
    strategy: str = "fedavg"
    options: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 4
    epochs: int = 1


def run(order: FlowerOrder) -> None:
    """Do what an order says."""
    killer = Killer(order)

    def tap(sent: Sent, grid: InProcessGrid) -> None:
        trains = (sent.kind, sent.direction) == ("train", "down")
        killer.passes(trains_in=sent.round if trains else 0)

    task = Task(rounds=order.rounds, epochs=order.epochs)
    options = dict(order.options)
    if order.strategy in STRATEGIES:
        apps = plugin_apps(Experiment(task, order.strategy, options))
    else:
        kind = getattr(fedpara_plugins_flower, order.strategy)
        apps = drift_apps(DriftExperiment(kind, options, task))
    outcome = federate(apps, order.section, tap=tap)
    order.log.write_text("\n".join(outcome.log))
    save_file({k: v.contiguous() for k, v in outcome.state.items()}, order.output)


if __name__ == "__main__":
    serve(FlowerOrder, run)
