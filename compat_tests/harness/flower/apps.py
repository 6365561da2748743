"""An ordinary Flower app for the cells, without the plugin and with the README's edit."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp, mod
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from harness.cells.strategies import STRATEGIES
from harness.flower.inprocess_grid import Engine, InProcessGrid, RunConfig, Sent
from harness.oracles.task import TrainingTask, evaluate, train
from harness.processes.kept_private import KeptPrivate, Traffic, kept_private

__all__ = [
    "Apps",
    "Experiment",
    "Hooks",
    "Outcome",
    "federate",
    "main_app",
    "plain_apps",
    "plugin_apps",
    "train_app",
]

Factory = Callable[[], nn.Module]
Hook = Callable[[nn.Module, int, int], None]


@dataclass(frozen=True)
class Hooks:
    """Where tests look into the user's code on a client: called with model, client and round.

    Attributes:
        loaded: the model has been built and has loaded what the message held.
        train: replaces the training.
        trained: before the model's state is taken for the reply.
        evaluated: after evaluation.
    """

    loaded: Hook | None = None
    train: Hook | None = None
    trained: Hook | None = None
    evaluated: Hook | None = None


@dataclass(frozen=True)
class Experiment:
    """Settings of the app.

    Attributes:
        task: the training problem.
        strategy: a name in `STRATEGIES`.
        options: further options of the strategy's constructor, beside those of its `StrategySpec`.
        hooks: see `Hooks`.
        evaluate_fn: whether the server evaluates the global model itself, each round.
        mods: mods of the client's training, inside those of the app; those of the `StrategySpec` if
            None.
    """

    task: TrainingTask = field(default_factory=TrainingTask)
    strategy: str = "fedavg"
    options: Mapping[str, Any] = field(default_factory=dict)
    hooks: Hooks = field(default_factory=Hooks)
    evaluate_fn: bool = True
    mods: tuple[Any, ...] | None = None


@dataclass
class Outcome:
    """The outcome of a run.

    Attributes:
        state: the global state at the end, with the dtypes the strategy gave it; {} if no round
            was aggregated.
        losses: losses of the global model on all test data, before the first round and after each.
        accuracies: the same; both are empty if the server does not evaluate.
        client_accuracies: weighted means of the clients' own evaluation, by round.
        sent: every message.
        log: Flower's and the plugin's log lines.
        grid: that was used.
        kept: what clients kept private; `federate` has searched all that left them for it.
    """

    grid: InProcessGrid
    state: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    client_accuracies: dict[int, float] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    error: Exception | None = None
    kept: KeptPrivate = field(default_factory=KeptPrivate)

    @property
    def traffic(self) -> list[Traffic]:
        """All messages, for `KeptPrivate`."""
        return [Traffic(each.direction, each.data, each.payloads) for each in self.sent]


@dataclass(frozen=True)
class Apps:
    """Both sides of an app.

    Attributes:
        client: builds the ClientApp.
        server: builds the ServerApp; it writes its results into the outcome.
        clients: how many clients there are.
    """

    client: Callable[[], ClientApp]
    server: Callable[[Outcome], ServerApp]
    clients: int = 4


def plain_apps(experiment: Experiment, net: Factory | None = None) -> Apps:
    """Return the app as it is without the plugin.

    Args:
        experiment: settings of the app.
        net: the model's class or factory; the task's class if None.
    """
    model = net or experiment.task.net
    return Apps(
        client=lambda: train_app(ClientApp(), experiment, model),
        server=lambda outcome: main_app(ServerApp(), experiment, model, outcome),
        clients=experiment.task.clients,
    )


ALL = frozenset({"net", "app"})
"""The two lines of a side, after the import: ``Net = ...`` and ``app = ...``."""


def plugin_apps(
    experiment: Experiment, *, client: frozenset[str] = ALL, server: frozenset[str] = ALL
) -> Apps:
    """Return the same app after the README's edit.

    Args:
        experiment: settings of the app.
        client: which of its two lines the client side has.
        server: which of its two lines the server side has.
    """
    import fedpara_plugins_flower as fedpara

    Net = experiment.task.net  # noqa: N806  (as the README writes it)

    def client_app() -> ClientApp:
        app = ClientApp(mods=[fedpara.client_mod]) if "app" in client else ClientApp()
        return train_app(app, experiment, fedpara.factorised(Net) if "net" in client else Net)

    def server_app(outcome: Outcome) -> ServerApp:
        app = fedpara.server_app(ServerApp()) if "app" in server else ServerApp()
        return main_app(
            app, experiment, fedpara.factorised(Net) if "net" in server else Net, outcome
        )

    return Apps(client_app, server_app, experiment.task.clients)


def federate(
    apps: Apps,
    run_config: RunConfig | None = None,
    *,
    client_config: RunConfig | None = None,
    engine: Engine = "simulation",
    tap: Callable[[Sent, InProcessGrid], None] | None = None,
    late: Callable[[Sent], bool] | None = None,
    raises: bool = True,
    search: bool = True,
) -> Outcome:
    """Run an app to its end, and assert that nothing left a client that it keeps private.

    Args:
        apps: both sides.
        run_config: config of both sides. If it has a method, and does not say otherwise, the
            option ``clip`` is off: plain loops train without it.
        client_config: config of the clients, where it differs.
        engine: see `InProcessGrid`.
        tap: see `InProcessGrid`.
        late: see `InProcessGrid`.
        raises: whether an error of the ServerApp is raised; else it is in the outcome.
        search: whether to search what left clients for what they keep private.
    """
    run_config, client_config = _unclipped(run_config), _unclipped(client_config)
    config = client_config if client_config is not None else run_config
    grid = InProcessGrid(
        apps.client, nodes=apps.clients, run_config=config, engine=engine, tap=tap, late=late
    )
    outcome = Outcome(grid, sent=grid.sent)
    with _captured_log() as outcome.log, kept_private() as outcome.kept:
        try:
            grid.serve(apps.server(outcome), run_config)
        except Exception as error:
            outcome.error = error
    if search:
        outcome.kept.check(outcome.traffic)
    if raises and outcome.error is not None:
        raise outcome.error
    return outcome


def _unclipped(config: RunConfig | None) -> RunConfig | None:
    if config is None or "fedpara.method" not in config:
        return config
    return {"fedpara.clip": "none", **config}


# The app -----------------------------------------------------------------------------------------


def train_app(app: ClientApp, experiment: Experiment, net: Factory) -> ClientApp:
    """Put the experiment's functions into a ClientApp, and return it."""
    task, hooks = experiment.task, experiment.hooks
    name = STRATEGIES[experiment.strategy].client_mod
    mods = [getattr(mod, name)] if name else []

    @app.train(mods=mods if experiment.mods is None else list(experiment.mods))
    def fit(message: Message, context: Context) -> Message:
        client, config, model = _begin(message, context, net, hooks)
        server_round = config["server-round"]
        if hooks.train is not None:
            hooks.train(model, client, server_round)
            loss = 0.0
        else:
            mu = config.get("proximal-mu")
            batches = task.batches(client, server_round)
            loss = train(model, batches, lr=config["lr"], proximal_mu=mu)
        if hooks.trained is not None:
            hooks.trained(model, client, server_round)
        metrics = MetricRecord({"train_loss": loss, "num-examples": task.size(client)})
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def score(message: Message, context: Context) -> Message:
        client, config, model = _begin(message, context, net, hooks)
        data = task.held_out(client)
        loss, accuracy = evaluate(model, data)
        if hooks.evaluated is not None:
            hooks.evaluated(model, client, config["server-round"])
        metrics = MetricRecord(
            {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data[1])}
        )
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def _begin(
    message: Message, context: Context, net: Factory, hooks: Hooks
) -> tuple[int, Any, nn.Module]:
    content: Any = message.content  # records of all kinds, as an untyped app reads them
    client = int(context.node_config["partition-id"])
    config = content["config"]
    model = net()
    model.load_state_dict(content["arrays"].to_torch_state_dict(), strict=True)
    if hooks.loaded is not None and message.metadata.message_type == "train":
        hooks.loaded(model, client, config["server-round"])
    return client, config, model


def main_app(app: ServerApp, experiment: Experiment, net: Factory, outcome: Outcome) -> ServerApp:
    """Put the experiment's main function into a ServerApp, and return it."""
    task = experiment.task

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        random.seed(task.seed)  # the strategies choose their clients with it
        np.random.seed(task.seed)  # and draw their noise from this one
        torch.manual_seed(task.seed)
        model = net()

        def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            model = net()
            model.load_state_dict(arrays.to_torch_state_dict(), strict=True)
            loss, accuracy = evaluate(model, task.test_data())
            outcome.losses.append(loss)
            outcome.accuracies.append(accuracy)
            return MetricRecord({"loss": loss, "accuracy": accuracy})

        result = _strategy(experiment).start(
            grid=grid,
            initial_arrays=ArrayRecord(model.state_dict()),
            num_rounds=task.rounds,
            train_config=ConfigRecord({"lr": task.lr}),
            evaluate_fn=evaluate_fn if experiment.evaluate_fn else None,
        )
        outcome.state = dict(result.arrays.to_torch_state_dict())
        outcome.client_accuracies = {
            server_round: float(metrics["eval_acc"])
            for server_round, metrics in result.evaluate_metrics_clientapp.items()
        }

    return app


def _strategy(experiment: Experiment) -> Strategy:
    spec = STRATEGIES[experiment.strategy]
    options: dict[str, Any] = {**spec.options, **experiment.options}
    home = import_module(spec.home)
    if spec.inside:
        options.setdefault("num_sampled_clients", experiment.task.clients)
        options["strategy"] = getattr(home, spec.inside)()
    made: Strategy = getattr(home, spec.class_name)(**options)
    return made


@contextmanager
def _captured_log() -> Iterator[list[str]]:
    """Collect what Flower and the plugin log, and keep it off the terminal."""
    lines: list[str] = []
    logger = logging.getLogger("flwr")
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.handlers, logger.level
    logger.handlers, logger.level = [handler], logging.DEBUG
    try:
        yield lines
    finally:
        logger.handlers, logger.level = before
