"""Other ways in: without a Python edit, with options in Python, and with a line at the class."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import nn

import fedpara_plugins as core
import fedpara_plugins_flower as fedpara
from fedpara_plugins.layers.base import FactorisedLayer
from fedpara_plugins_flower.run import Run, open_run
from fedpara_plugins_flower.settings import FlowerSettings
from harness.cells.flower import GAMMA
from harness.flower.apps import (
    Apps,
    Experiment,
    Outcome,
    federate,
    main_app,
    plugin_apps,
    train_app,
)
from harness.oracles.task import Net as PlainNet
from harness.oracles.task import TrainingTask

TASK = TrainingTask(clients=2, rounds=2, epochs=1)

FILES = {
    "task.py": """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super(Net, self).__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images):
        return self.head(self.body(images))

def make_net():
    return Net()
""",
    "client_app.py": """
from torch.optim import SGD
from torch.nn.functional import cross_entropy
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from no_edit_app.task import {name}
from harness.oracles.task import TrainingTask, train

app = ClientApp()
data = TrainingTask(clients=2)

@app.train()
def fit(message, context):
    model, client = {name}(), int(context.node_config["partition-id"])
    model.load_state_dict(message.content["arrays"].to_torch_state_dict(), strict=True)
    train(model, data.batches(client, message.content["config"]["server-round"]), lr=0.05)
    metrics = MetricRecord({{"num-examples": data.size(client)}})
    content = RecordDict({{"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}})
    return Message(content, reply_to=message)
""",
    "strategy.py": """
from flwr.serverapp.strategy import FedAvg
from no_edit_app.task import {name}

class Checking(FedAvg):
    def aggregate_train(self, server_round, replies):
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            {name}().load_state_dict(arrays.to_torch_state_dict(), strict=True)
        return arrays, metrics
""",
    "server_app.py": """
import torch
from flwr.app import ArrayRecord
from flwr.serverapp import ServerApp
from no_edit_app.strategy import Checking
from no_edit_app.task import {name}

app = ServerApp()
results = []

@app.main()
def main(grid, context):
    torch.manual_seed(1)
    strategy = Checking(fraction_evaluate=0.0, min_available_nodes=2)
    arrays = ArrayRecord({name}().state_dict())
    results.append(strategy.start(grid=grid, initial_arrays=arrays, num_rounds=2).arrays)
""",
}

NAMED = {
    "fedpara.serverapp": "no_edit_app.server_app:app",
    "fedpara.clientapp": "no_edit_app.client_app:app",
}


@pytest.fixture(params=["Net", "make_net"])
def model(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Write an app to disk as its author would, and yield how its files build the model."""
    folder = tmp_path / "no_edit_app"
    folder.mkdir()
    (folder / "__init__.py").touch()
    for name, text in FILES.items():
        content = text if name == "task.py" else text.format(name=request.param)
        (folder / name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield request.param
    for name in [name for name in sys.modules if name.partition(".")[0] == "no_edit_app"]:
        del sys.modules[name]


def _section(method: str, codec: str = "none", **options: Any) -> dict[str, Any]:
    chosen = {"method": method, "codec": codec, "gamma": GAMMA, **options}
    return {f"fedpara.{key}": value for key, value in chosen.items()}


def _entry(section: dict[str, Any], **options: Any) -> Outcome:
    from fedpara_plugins_flower import entry

    apps = Apps(lambda: entry.client_app, lambda outcome: entry.server_app, clients=2)
    return federate(apps, section, **options)


def _plain() -> Outcome:
    def app(side: str) -> Any:
        return importlib.import_module(f"no_edit_app.{side}_app").app

    return federate(Apps(lambda: app("client"), lambda outcome: app("server"), clients=2))


# Without an edit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "codec"), [("fedpara", "none"), ("pfedpara", "int8")])
def test_an_app_runs_without_an_edit(model: str, method: str, codec: str) -> None:
    section = {**_section(method, codec), **NAMED, "fedpara.model": f"no_edit_app.task:{model}"}
    outcome = _entry(section)
    (final,) = importlib.import_module("no_edit_app.server_app").results
    assert {"body.1.x1", "body.1.y2", "head.weight"} <= set(final)
    dense = sum(value.numel() * 4 for value in PlainTask.state().values())
    assert len(outcome.sent) == 2 * 2 * 2
    for sent in outcome.sent:
        assert 0 < sent.array_bytes < dense


class PlainTask:
    """The model of `FILES`, for its size."""

    @staticmethod
    def state() -> dict[str, Any]:
        body = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.SiLU())
        return dict(nn.ModuleDict({"body": body, "head": nn.Linear(64, 10)}).state_dict())


def test_with_everything_off_the_entry_sends_what_the_app_sends(model: str) -> None:
    plain = _plain()
    for section in ({**_section("none"), **NAMED}, NAMED):
        entered = _entry(section)
        mine, theirs = ([s.content.object_id for s in run.sent] for run in (entered, plain))
        assert len(mine) == 8
        assert mine == theirs


def test_what_the_section_lacks_is_named(model: str) -> None:
    whole = {**_section("fedpara"), **NAMED, "fedpara.model": f"no_edit_app.task:{model}"}
    for option in ("serverapp", "model"):
        section = {key: value for key, value in whole.items() if key != f"fedpara.{option}"}
        outcome = _entry(section, raises=False)
        assert isinstance(outcome.error, core.ConfigError)
        assert f'{option} = "' in str(outcome.error)
        assert not outcome.sent
    outcome = _entry({**whole, "fedpara.model": "no_edit_app.task:Nett"}, raises=False)
    assert "no_edit_app.task:Nett" in str(outcome.error)
    without = {key: value for key, value in whole.items() if key != "fedpara.clientapp"}
    outcome = _entry(whole, client_config=without, raises=False)
    assert 'clientapp = "my_app.client_app:app"' in str(outcome.error)


# Options in Python, for run_simulation -----------------------------------------------------------


@pytest.mark.parametrize(("method", "codec"), [("fedpara", "none"), ("pfedpara", "int8")])
def test_options_in_python_are_those_of_the_section(method: str, codec: str) -> None:
    """``run_simulation`` has an empty run config."""
    experiment = Experiment(TASK)
    options = {"method": method, "codec": codec, "gamma": GAMMA}
    net = fedpara.factorised(TASK.net)
    in_python = Apps(
        lambda: train_app(ClientApp(mods=[fedpara.client_mod_with(**options)]), experiment, net),
        lambda outcome: main_app(
            fedpara.server_app(ServerApp(), **options), experiment, net, outcome
        ),
        clients=2,
    )
    mine = federate(in_python)
    # An empty text is the default, which the harness switches off elsewhere.
    theirs = federate(plugin_apps(experiment), _section(method, codec, clip=""))
    assert [s.content.object_id for s in mine.sent] == [s.content.object_id for s in theirs.sent]
    assert any(sent.array_bytes for sent in mine.sent)
    if method == "pfedpara":  # which the config may not undo
        with pytest.raises(core.FedParaError, match="this device keeps method 'pfedpara'"):
            federate(in_python, _section("fedpara", codec))
        return
    # What the config says wins.
    off = federate(in_python, _section("none"))
    plain = federate(plugin_apps(experiment), {})
    assert [s.content.object_id for s in off.sent] == [s.content.object_id for s in plain.sent]


@pytest.mark.parametrize("side", ["client", "server"])
def test_options_on_one_side_alone_end_the_run_in_its_first_round(side: str) -> None:
    experiment, options = Experiment(TASK), {"method": "fedpara"}
    net = fedpara.factorised(TASK.net)
    mod = fedpara.client_mod_with(**(options if side == "client" else {}))

    def server(outcome: Outcome) -> ServerApp:
        app = fedpara.server_app(ServerApp(), **(options if side == "server" else {}))
        return main_app(app, experiment, net, outcome)

    client = train_app(ClientApp(mods=[mod]), experiment, net)
    outcome = federate(Apps(lambda: client, server, clients=2), raises=False)
    assert outcome.error is not None
    assert "the same" in str(outcome.error)
    assert "options" in str(outcome.error)
    assert {(sent.round, sent.kind) for sent in outcome.sent} == {(1, "train")}


def test_bad_options_in_python_are_refused_where_they_stand() -> None:
    with pytest.raises(core.ConfigError, match="gama"):
        fedpara.client_mod_with(gama=0.3)
    with pytest.raises(core.ConfigError, match="method"):
        fedpara.server_app(ServerApp(), method="fedparra")


def test_the_mod_with_options_can_be_pickled() -> None:
    """Ray takes it to other processes."""
    again = pickle.loads(pickle.dumps(fedpara.client_mod_with(method="fedpara")))
    assert again.keywords == {"options": {"method": "fedpara"}}


# A version of Flower that is too old -------------------------------------------------------------


@pytest.mark.parametrize("name", ["client_mod", "server_app", "factorised"])
def test_an_old_flower_is_refused_when_the_app_is_imported(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(vars(fedpara), name, raising=False)
    monkeypatch.setattr(fedpara, "version", lambda package: "1.21.0")
    with pytest.raises(core.PluginError, match=r"needs flwr>=1.22, found 1.21.0: upgrade flwr"):
        getattr(fedpara, name)
    monkeypatch.setattr(fedpara, "version", lambda package: "1.22.0.dev20251001")
    assert getattr(fedpara, name)


# A line at the class -----------------------------------------------------------------------------


@fedpara.factorised
class Decorated(PlainNet):
    """Names itself in its constructor, as many models do."""

    def __init__(self) -> None:
        super(Decorated, self).__init__()  # noqa: UP008


class Below(Decorated):
    """A subclass is a model of its own."""


def _in_run(method: str = "fedpara") -> Any:
    return open_run(Run(FlowerSettings.from_run_config({}, {"method": method}), side="client"))


def _converted(model: nn.Module) -> bool:
    return any(isinstance(module, FactorisedLayer) for module in model.modules())


def test_a_class_that_is_decorated_builds_the_runs_model() -> None:
    with _in_run():
        model = Decorated()
        assert type(model) is Decorated
        assert _converted(model)
        for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert list(again.state_dict()) == list(model.state_dict())
        assert not _converted(Below())
    with _in_run("none"):
        assert not _converted(Decorated())
    plain: Any = Decorated
    assert not _converted(plain.__wrapped__())


def test_a_class_that_is_decorated_is_not_built_outside_a_run() -> None:
    with pytest.raises(core.ConfigError, match="outside a run"):
        Decorated()


def test_decorating_twice_is_decorating_once() -> None:
    assert fedpara.factorised(Decorated) is Decorated
    with _in_run():
        assert _converted(Decorated())


def test_a_file_that_builds_the_plain_model_is_told_where_the_line_goes() -> None:
    experiment = Experiment(TASK)
    whole = plugin_apps(experiment)

    def server(outcome: Outcome) -> ServerApp:
        app = fedpara.server_app(ServerApp())
        inner = main_app(ServerApp(), experiment, fedpara.factorised(TASK.net), outcome)

        @app.main()
        def main(grid: Any, context: Any) -> None:
            inner(grid, context)
            TASK.net().load_state_dict(outcome.state)  # another file, without the line

        return app

    outcome = federate(Apps(whole.client, server, 2), _section("fedpara"), raises=False)
    assert isinstance(outcome.error, core.ConfigError)
    assert "@fedpara.factorised" in str(outcome.error)
