"""The first message to a client, whose own model nobody knows yet: large ones wait for it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

import fedpara_plugins as core
import fedpara_plugins_flower as fedpara
from fedpara_plugins import ModelSpec
from fedpara_plugins.exchange import ExchangeSettings, budget
from fedpara_plugins.references import PerClientDownlink
from fedpara_plugins_flower.client import arrival
from fedpara_plugins_flower.messages.deferred_record import DeferredRecord
from fedpara_plugins_flower.messages.records import payload_record
from harness.cells.flower import GAMMA
from harness.flower import inprocess_grid
from harness.flower.apps import Apps, Experiment, federate, plugin_apps
from harness.flower.legacy_apps import LegacyExperiment, legacy_plugin_apps
from harness.oracles.task import TrainingTask

TASK = TrainingTask(clients=2, rounds=2, epochs=1)


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let no message count as small; return the records that waited."""
    made: list[Any] = []

    class Noted(arrival.DeferredRecord):
        def __init__(self, make: Any) -> None:
            super().__init__(make)
            made.append(self)

    monkeypatch.setattr(budget, "SLACK", 0)
    monkeypatch.setattr(arrival, "DeferredRecord", Noted)
    return made


def _section(method: str, **options: Any) -> dict[str, Any]:
    chosen = {"method": method, "gamma": GAMMA, "codec": "balanced", **options}
    return {f"fedpara.{key}": value for key, value in chosen.items()}


METHODS = [("pfedpara", {}), ("fedpara", {"local": "dense"}), ("none", {"private": "fc2.*"})]


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize(("method", "options"), METHODS, ids=lambda value: str(value))
@pytest.mark.parametrize("legacy", [False, True], ids=["messages", "legacy"])
def test_waiting_changes_nothing(
    deferred: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    options: dict[str, Any],
    legacy: bool,
) -> None:
    apps: Any = (
        legacy_plugin_apps(LegacyExperiment(TASK)) if legacy else plugin_apps(Experiment(TASK))
    )
    waited = federate(apps, _section(method, **options))
    assert len(deferred) == TASK.clients  # in later rounds the clients know their own model
    monkeypatch.undo()
    whole = federate(apps, _section(method, **options))
    assert whole.state
    for name, value in whole.state.items():
        assert torch.equal(waited.state[name], value), name


def test_an_app_may_answer_with_what_it_was_sent_and_keep_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "SLACK", 0)
    net = fedpara.factorised(TASK.net)

    def client_app() -> ClientApp:
        app = ClientApp(mods=[fedpara.client_mod])

        @app.train()
        def fit(message: Message, context: Context) -> Message:
            content: Any = message.content
            net()
            assert isinstance(content["arrays"], DeferredRecord) == ("kept" not in context.state)
            context.state["kept"] = content["arrays"]
            answer = {"arrays": content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
            return Message(RecordDict(answer), reply_to=message)

        return app

    made = plugin_apps(Experiment(TASK, options={"fraction_evaluate": 0.0}))
    outcome = federate(Apps(client_app, made.server, TASK.clients), _section("fedpara"))
    kept: Any = outcome.grid.client_state(0)["kept"]
    assert list(kept.to_torch_state_dict()) == list(outcome.state)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": lambda record: record.copy(),
    "shallow": copy.copy,
    "deep": copy.deepcopy,
    "pickle": lambda record: pickle.loads(pickle.dumps(record)),
    "waiting": lambda record: DeferredRecord(lambda: dict(record.items())),
    "wire": lambda record: inprocess_grid.WireObject.of(record).rebuilt(),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_record_that_waits_is_the_whole_record(name: str) -> None:
    whole = fedpara.arrays({"w": torch.arange(3.0).bfloat16()})
    again = COPIES[name](DeferredRecord(lambda: whole))
    assert DeferredRecord(lambda: whole) == again
    assert dict(again.items()) == dict(whole.items())


# A message that describes far more than the client's own model ------------------------------------


class _Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Linear(64, width)
        self.head = nn.Linear(width, 4)


def _message(width: int) -> tuple[Message, int]:
    """Return a message that describes the model at a width, from the seed where it can."""
    model = core.convert(_Net(width), method="fedpara", rank=2, min_size=256, init="seeded")
    spec, state = ModelSpec.of(model), model.state_dict()
    settings = ExchangeSettings(**ExchangeSettings.read({"method": "fedpara", "codec": "small"}))
    coded = PerClientDownlink().encode(
        "1", "arrays", state, spec=spec, codec=settings.downlink, decoders=None, extra={}
    )
    content = RecordDict({"arrays": payload_record(coded.payload)})
    return Message(content, dst_node_id=1, message_type="train"), len(coded.payload)


@pytest.mark.parametrize("local", ["factors", "dense"])
def test_a_model_of_another_size_is_refused_before_it_is_made(local: str) -> None:
    net = fedpara.factorised(lambda: _Net())
    seen: list[dict[str, Tensor]] = []

    def app(message: Message, context: Context) -> Message:
        net()
        arrays = message.content["arrays"]
        assert isinstance(arrays, ArrayRecord)
        seen.append(arrays.to_torch_state_dict())
        return Message(RecordDict(), reply_to=message)

    options = {"method": "fedpara", "rank": 2, "min-size": 256, "codec": "small", "local": local}
    run_config = {f"fedpara.{key}": value for key, value in options.items()}

    def answer(width: int) -> None:
        context = Context(1, 1, {}, RecordDict(), run_config)
        with inprocess_grid._identity(1):
            message, _ = _message(width)
            fedpara.client_mod(message, context, app)

    answer(64)
    assert len(seen) == 1
    with pytest.raises(core.TooLargeError):
        answer(400_000)
    assert len(seen) == 1
