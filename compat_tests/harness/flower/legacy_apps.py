"""The same app with Flower's legacy API: ``NumPyClient``, ``server_fn``, arrays in lists."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Context
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerAppComponents, ServerConfig, strategy
from flwr.serverapp import ServerApp
from numpy.typing import NDArray
from torch import nn

from harness.cells.strategies import STRATEGIES
from harness.flower.apps import Apps, Factory, Hooks, Outcome
from harness.oracles.task import TrainingTask, evaluate, train

__all__ = [
    "ARRAY_ACCESS",
    "LegacyExperiment",
    "components",
    "legacy_client_app",
    "legacy_plain_apps",
    "legacy_plugin_apps",
]

Arrays = list[NDArray[Any]]


@dataclass(frozen=True)
class ArrayAccess:
    """How an app reads the arrays that it sends from a model, and how it loads them again."""

    get: Callable[[nn.Module], Arrays]
    set: Callable[[nn.Module, Arrays], None]


def _get_state(model: nn.Module) -> Arrays:
    return [value.cpu().numpy().copy() for value in model.state_dict().values()]


def _set_state(model: nn.Module, arrays: Arrays) -> None:
    pairs = zip(model.state_dict(), arrays, strict=True)
    model.load_state_dict({key: torch.as_tensor(value) for key, value in pairs}, strict=True)


def _get_parameters(model: nn.Module) -> Arrays:
    return [value.detach().cpu().numpy().copy() for value in model.parameters()]


def _set_parameters(model: nn.Module, arrays: Arrays) -> None:
    with torch.no_grad():
        for value, array in zip(model.parameters(), arrays, strict=True):
            value.copy_(torch.as_tensor(array))


def _get_trained(model: nn.Module) -> Arrays:
    trained = [value for value in model.parameters() if value.requires_grad]
    return [value.detach().cpu().numpy().copy() for value in trained]


def _set_trained(model: nn.Module, arrays: Arrays) -> None:
    trained = [value for value in model.parameters() if value.requires_grad]
    with torch.no_grad():
        for value, array in zip(trained, arrays, strict=True):
            value.copy_(torch.as_tensor(array))


ARRAY_ACCESS = {
    "state": ArrayAccess(_get_state, _set_state),
    "parameters": ArrayAccess(_get_parameters, _set_parameters),
    "trained": ArrayAccess(_get_trained, _set_trained),
}


@dataclass(frozen=True)
class LegacyExperiment:
    """Settings of the app.

    Attributes:
        task: the training problem.
        strategy: a name in `STRATEGIES`; the class of that name in ``flwr.server.strategy``.
        options: further options of the strategy's constructor, beside those of its `StrategySpec`.
        hooks: see `Hooks`.
        part: the part of the model that travels, a name in `ARRAY_ACCESS`.
        initial: whether the server gives the first weights, or asks a client for them.
        evaluate_fn: whether the server evaluates the global model itself.
    """

    task: TrainingTask = field(default_factory=TrainingTask)
    strategy: str = "fedavg"
    options: Mapping[str, Any] = field(default_factory=dict)
    hooks: Hooks = field(default_factory=Hooks)
    part: str = "state"
    initial: bool = True
    evaluate_fn: bool = True


def legacy_plain_apps(experiment: LegacyExperiment, net: Factory | None = None) -> Apps:
    """Return the app as it is without the plugin."""
    model = net or experiment.task.net
    return Apps(
        client=lambda: legacy_client_app(experiment, model, []),
        server=lambda outcome: ServerApp(server_fn=components(experiment, model, outcome)),
        clients=experiment.task.clients,
    )


ALL = frozenset({"net", "app"})


def legacy_plugin_apps(
    experiment: LegacyExperiment, *, client: frozenset[str] = ALL, server: frozenset[str] = ALL
) -> Apps:
    """Return the same app after the README's edit, or with only some of its lines."""
    import fedpara_plugins_flower as fedpara

    Net = experiment.task.net  # noqa: N806  (as the README writes it)

    def client_app() -> ClientApp:
        net = fedpara.factorised(Net) if "net" in client else Net
        return legacy_client_app(experiment, net, [fedpara.client_mod] if "app" in client else [])

    def server_app(outcome: Outcome) -> ServerApp:
        net = fedpara.factorised(Net) if "net" in server else Net
        app = ServerApp(server_fn=components(experiment, net, outcome))
        return fedpara.server_app(app) if "app" in server else app

    return Apps(client_app, server_app, experiment.task.clients)


class _Client(NumPyClient):
    def __init__(self, experiment: LegacyExperiment, model: nn.Module, client: int) -> None:
        self.experiment, self.model, self.number = experiment, model, client
        self.part = ARRAY_ACCESS[experiment.part]

    def get_parameters(self, config: dict[str, Any]) -> Arrays:
        return self.part.get(self.model)

    def fit(self, parameters: Arrays, config: dict[str, Any]) -> tuple[Arrays, int, dict[str, Any]]:
        task, hooks, number = self.experiment.task, self.experiment.hooks, self.number
        server_round = int(config["server-round"])
        self.part.set(self.model, parameters)
        if hooks.loaded is not None:
            hooks.loaded(self.model, number, server_round)
        if hooks.train is not None:
            hooks.train(self.model, number, server_round)
            loss = 0.0
        else:
            batches = task.batches(number, server_round)
            mu = config.get("proximal_mu")
            loss = train(self.model, batches, lr=config["lr"], proximal_mu=mu)
        if hooks.trained is not None:
            hooks.trained(self.model, number, server_round)
        return self.part.get(self.model), task.size(number), {"train_loss": loss}

    def evaluate(
        self, parameters: Arrays, config: dict[str, Any]
    ) -> tuple[float, int, dict[str, Any]]:
        self.part.set(self.model, parameters)
        data = self.experiment.task.held_out(self.number)
        loss, accuracy = evaluate(self.model, data)
        if self.experiment.hooks.evaluated is not None:
            self.experiment.hooks.evaluated(self.model, self.number, int(config["server-round"]))
        return loss, len(data[1]), {"eval_acc": accuracy}


def legacy_client_app(experiment: LegacyExperiment, net: Factory, mods: list[Any]) -> ClientApp:
    """Build the client's side, with any mods."""

    def client_fn(context: Context) -> Any:
        client = int(context.node_config["partition-id"])
        if not experiment.initial:
            torch.manual_seed(experiment.task.seed)  # whichever client is asked starts the run
        return _Client(experiment, net(), client).to_client()

    return ClientApp(client_fn=client_fn, mods=mods)


def components(
    experiment: LegacyExperiment, net: Factory, outcome: Outcome
) -> Callable[[Context], ServerAppComponents]:
    """Return the ``server_fn``."""
    task, part = experiment.task, ARRAY_ACCESS[experiment.part]

    def evaluate_fn(
        server_round: int, arrays: Arrays, config: dict[str, Any]
    ) -> tuple[float, dict[str, Any]]:
        model = net()
        part.set(model, arrays)
        outcome.state = {key: value.clone() for key, value in model.state_dict().items()}
        loss, accuracy = evaluate(model, task.test_data())
        outcome.losses.append(loss)
        outcome.accuracies.append(accuracy)
        return loss, {"accuracy": accuracy}

    def mean(metrics: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
        total = sum(size for size, _ in metrics)
        value = sum(size * m["eval_acc"] for size, m in metrics) / total
        outcome.client_accuracies[len(outcome.client_accuracies) + 1] = value
        return {"eval_acc": value}

    def server_fn(context: Context) -> ServerAppComponents:
        random.seed(task.seed)
        np.random.seed(task.seed)
        torch.manual_seed(task.seed)
        spec = STRATEGIES[experiment.strategy]
        options: dict[str, Any] = {**spec.options, **experiment.options}
        if experiment.evaluate_fn:
            options["evaluate_fn"] = evaluate_fn
        if experiment.initial:
            options["initial_parameters"] = ndarrays_to_parameters(part.get(net()))
        elif experiment.strategy == "fedadam":
            raise ValueError("FedAdam of the legacy API needs initial parameters")
        chosen = getattr(strategy, spec.class_name)(
            min_fit_clients=2,
            min_evaluate_clients=2,
            min_available_clients=task.clients,
            on_fit_config_fn=lambda server_round: {"server-round": server_round, "lr": task.lr},
            on_evaluate_config_fn=lambda server_round: {"server-round": server_round},
            evaluate_metrics_aggregation_fn=mean,
            **options,
        )
        config = ServerConfig(num_rounds=task.rounds)
        return ServerAppComponents(strategy=chosen, config=config)

    return server_fn
