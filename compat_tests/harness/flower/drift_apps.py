"""An ordinary Flower app whose clients correct their steps, with the plugin's mods or without."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import nn

import fedpara_plugins_flower as fedpara
from harness.flower.apps import Apps, Outcome
from harness.oracles.task import TrainingTask, evaluate, train

__all__ = ["DriftExperiment", "drift_apps"]

Train = Callable[[nn.Module, int, int], None]


@dataclass
class DriftExperiment:
    """Settings of the app.

    Attributes:
        strategy: a strategy of the plugin, or any of Flower's.
        options: arguments of its constructor.
        task: the training problem.
        train: replaces the training: model, client, round.
        losses: whether clients can make the pass that SCAFFOLD's option I needs.
        corrects: whether the client has the lines of the algorithm, and whether both.
        factory: makes the model in an app without the plugin's lines; the task's class if None.
        made: the strategy of the last run.
    """

    strategy: type[Strategy]
    options: Mapping[str, Any] = field(default_factory=dict)
    task: TrainingTask = field(default_factory=TrainingTask)
    train: Train | None = None
    losses: bool = False
    corrects: frozenset[str] = frozenset({"context", "add_to"})
    factory: Callable[[], nn.Module] | None = None
    made: Any = None


def drift_apps(
    experiment: DriftExperiment, *, mods: bool = True, first: Sequence[Any] = ()
) -> Apps:
    """Return both sides of the app, with the README's edit of the plugin or without.

    Args:
        experiment: settings of the app.
        mods: whether both sides have the plugin's lines.
        first: mods of the clients before the plugin's.
    """
    net = experiment.factory or experiment.task.net
    build = fedpara.factorised(net) if mods else net

    def client() -> ClientApp:
        app = ClientApp(mods=[*first, fedpara.client_mod]) if mods else ClientApp()
        return _client(app, experiment, build)

    def server(outcome: Outcome) -> ServerApp:
        app = fedpara.server_app(ServerApp()) if mods else ServerApp()
        return _server(app, experiment, build, outcome)

    return Apps(client, server, experiment.task.clients)


def _client(
    app: ClientApp, experiment: DriftExperiment, build: Callable[[], nn.Module]
) -> ClientApp:
    task = experiment.task

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        client, server_round, model = _begin(message, context, build)

        def losses() -> Any:
            for images, labels in task.batches(client, server_round):
                yield nn.functional.cross_entropy(model(images), labels), len(labels)

        def run() -> None:
            if experiment.train is not None:
                experiment.train(model, client, server_round)
            else:
                train(model, task.batches(client, server_round), lr=task.lr)

        correction = None
        if "context" in experiment.corrects:
            passes = losses if experiment.losses else None
            with fedpara.correction(model, message, context, losses=passes) as correction:
                run()
        else:
            run()
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "metrics": MetricRecord({"num-examples": task.size(client)}),
            }
        )
        if correction is not None and "add_to" in experiment.corrects:
            correction.add_to(content)
        return Message(content, reply_to=message)

    @app.evaluate()
    def score(message: Message, context: Context) -> Message:
        client, _, model = _begin(message, context, build)
        loss, accuracy = evaluate(model, task.held_out(client))
        metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": 40})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def _begin(
    message: Message, context: Context, build: Callable[[], nn.Module]
) -> tuple[int, int, nn.Module]:
    content: Any = message.content
    model = build()
    model.load_state_dict(content["arrays"].to_torch_state_dict(), strict=True)
    return int(context.node_config["partition-id"]), int(content["config"]["server-round"]), model


def _server(
    app: ServerApp,
    experiment: DriftExperiment,
    build: Callable[[], nn.Module],
    outcome: Outcome,
) -> ServerApp:
    task = experiment.task

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        random.seed(task.seed)  # the strategies choose their clients with it
        torch.manual_seed(task.seed)
        model = build()

        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            model = build()
            model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
            loss, accuracy = evaluate(model, task.test_data())
            outcome.losses.append(loss)
            outcome.accuracies.append(accuracy)
            return MetricRecord({"loss": loss, "accuracy": accuracy})

        experiment.made = experiment.strategy(**experiment.options)
        result = experiment.made.start(
            grid=grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=task.rounds,
            train_config=ConfigRecord({"lr": task.lr}),
            evaluate_fn=evaluate_fn,
        )
        outcome.state = dict(result.arrays.to_torch_state_dict())
        outcome.client_accuracies = {
            server_round: float(metrics["eval_acc"])
            for server_round, metrics in result.evaluate_metrics_clientapp.items()
        }

    return app
