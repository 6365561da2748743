"""Ways of an app's code through which a curious server may get private values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

import fedpara_plugins_flower as fedpara
from fedpara_plugins.models import ModelSpec
from harness.flower.hostile_cases import CASES, LIES, Case, check_nothing_left
from harness.flower.hostile_server import Device, Net, State, described, planted, value_of

EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FACTORS = {name: case for name, case in CASES.items() if case.local == "factors"}

SIDE = ("fedpara.variate", "fedpara.update.variate")
QUERY = {"config": ConfigRecord({"a": 1})}


# What the app answers -----------------------------------------------------------------------------


def _composed(model: nn.Module, message: Message | None) -> State:
    """The dense weights of a converted model."""
    return ModelSpec.of(model).dense_state(planted(model.state_dict()))


def _in_wrapper(model: nn.Module, message: Message | None) -> State:
    """The state of a compiled model."""
    return {f"_orig_mod.{k}": v for k, v in planted(model.state_dict()).items()}


def _both(model: nn.Module, message: Message | None) -> State:
    """The names of the state, and those of the dense weights."""
    return {**planted(model.state_dict()), **_composed(model, message)}


def _in_place(model: nn.Module, message: Message | None) -> State:
    """The very arrays of the message, which the app has trained in place."""
    if message is None or not message.content.array_records:
        return planted(model.state_dict())
    return planted(next(iter(message.content.array_records.values())).to_torch_state_dict())


ANSWERS = {
    "composed": _composed,
    "in a wrapper": _in_wrapper,
    "both": _both,
    "in place": _in_place,
}


@pytest.mark.in_turn
@pytest.mark.parametrize("lie", ["", "nothing private", "wrapped", "dense", "wrapped besides"])
@pytest.mark.parametrize("answer", ANSWERS)
@EACH_CASE
def test_answers_with_other_names(case: Case, answer: str, lie: str) -> None:
    device = case.device(answer=ANSWERS[answer], loads=not lie)
    record = LIES[lie](case) if lie else case.honest()
    sent = [{"arrays": case.honest()}, {"arrays": record}, {"arrays": case.honest(), "b": record}]
    check_nothing_left(case, *(device.send(content) for content in sent))
    check_nothing_left(case, case.device(answer=ANSWERS[answer]).send({"arrays": record}))


def _positions(model: nn.Module, message: Message | None) -> State:
    """A list, as ``ArrayRecord([...])`` names it."""
    return {str(n): v for n, v in enumerate(planted(model.state_dict()).values())}


@pytest.mark.parametrize("lie", ["", "nothing private", "positions", "dense"])
@EACH_CASE
def test_positions(case: Case, lie: str) -> None:
    """No name says which of them are private."""
    device = case.device(answer=_positions, loads=not lie)
    record = LIES[lie](case) if lie else case.honest()
    sent = [{"arrays": record}, {"arrays": case.honest(), "more": record}, {"parameters": record}]
    check_nothing_left(case, *(device.send(content) for content in sent))


@pytest.mark.parametrize("name", ["arrays", "parameters", "fitins.parameters"])
@EACH_CASE
def test_arrays_of_the_message_itself(case: Case, name: str) -> None:
    """An app that hands on what it got, where its private values of the round before stand too."""
    device = case.device()
    first = device.send({"arrays": case.honest()})

    def as_received(model: nn.Module, message: Message | None) -> Any:
        assert message is not None
        return next(iter(message.content.array_records.values())).to_torch_state_dict()

    device.answer = as_received
    content = {name: case.honest()}
    legacy = {**content, "fitins.config": ConfigRecord({})}
    kinds = ("train", "evaluate", "query")
    replies = [device.send(content, kind) for kind in kinds] + [device.send(legacy)]
    check_nothing_left(case, first, *replies)


def test_patterns_count_for_other_models_too() -> None:
    """A second model of the app, which it has built without the plugin."""
    case = Case("none", "head*")
    device = case.device()
    app = ClientApp(mods=[fedpara.client_mod])

    @app.train()
    def fit(message: Message, context: Any) -> Message:
        state = planted(device.net().state_dict())
        second = {"head2.weight": state["head.weight"]}
        records = {"arrays": ArrayRecord(state), "second": ArrayRecord(second)}
        return Message(RecordDict(dict(records)), reply_to=message)

    device.grid.replace_app(lambda: app)
    reply = device.send({"arrays": case.honest()})
    assert case.secrets.found_in(reply.data) == 0


# Messages that hold no model ----------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True], ids=["built anew", "cached"])
@EACH_CASE
def test_messages_without_arrays(case: Case, cached: bool) -> None:
    """With a model of this run, of an earlier one, or none."""
    device = case.device(loads=False, cached=cached)
    kinds = ("train", "evaluate", "query", "query.special")
    first = [device.send(QUERY, kind) for kind in kinds]
    device.send({"arrays": case.honest()})
    check_nothing_left(case, *first, *(device.send(QUERY, kind) for kind in kinds))


@pytest.mark.parametrize("stage", ["", "setup", "share_keys", "collect_masked_vectors", "unmask"])
@EACH_CASE
def test_steps_of_secagg_without_arrays(case: Case, stage: str) -> None:
    device = case.device(loads=False)
    configs = ConfigRecord({"stage": stage} if stage else {})
    content = {"secaggplus_configs": configs}
    first = [device.send(content, kind) for kind in ("train", "query")]
    device.send({"arrays": case.honest()})
    check_nothing_left(case, *first, *(device.send(content, kind) for kind in ("train", "query")))


@pytest.mark.parametrize("name", SIDE)
@EACH_CASE
def test_side_records(case: Case, name: str) -> None:
    """An app that answers under the names that it got."""
    side = described(None, case.state)
    device = case.device()
    alone = device.send({name: side})
    beside = device.send({"arrays": case.honest(), name: side})
    before = device.send({name: side, "arrays": case.honest()})
    check_nothing_left(case, alone, beside, before, device.send({name: side}))


@EACH_CASE
def test_a_message_without_content(case: Case) -> None:
    device = case.device()
    device.send({"arrays": case.honest()})
    app = ClientApp(mods=[fedpara.client_mod])

    @app.train()
    def fit(message: Message, context: Any) -> Message:
        arrays = ArrayRecord(planted(device.net().state_dict()))
        return Message(RecordDict({"arrays": arrays}), reply_to=message)

    device.grid.replace_app(lambda: app)
    check_nothing_left(case, device.send(Error(code=0, reason="none"), "train"))


# Models that live longer than a run ---------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize("lie", LIES)
@EACH_CASE
def test_a_model_that_was_built_in_an_earlier_message(case: Case, lie: str) -> None:
    device = case.device(cached=True, loads=False)
    record = LIES[lie](case)
    sent = [{"arrays": case.honest()}, {"arrays": record}, {"a": case.honest(), "b": record}]
    check_nothing_left(case, *(device.send(content) for content in sent))


# Corrections of steps -----------------------------------------------------------------------------


class _Corrected(Device):
    """A client that trains with `fedpara.correction`: one step, by recognisable values."""

    def _app(self) -> ClientApp:
        app = ClientApp(mods=list(self.mods))

        @app.train()
        def fit(message: Message, context: Any) -> Message:
            model = self.net()
            given: Any = message.content["arrays"]
            model.load_state_dict(given.to_torch_state_dict(), strict=False)
            with fedpara.correction(model, message, context) as correction:
                optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
                for name, parameter in model.named_parameters():
                    parameter.grad = -value_of(name, parameter.shape)
                optimizer.step()
            arrays, examples = ArrayRecord(model.state_dict()), MetricRecord({"num-examples": 1})
            content = RecordDict({"arrays": arrays, "metrics": examples})
            return Message(correction.add_to(content), reply_to=message)

        return app


def _corrected(case: Case) -> Device:
    net: Callable[[], nn.Module] = Net
    net = fedpara.factorised(lambda: Net()) if case.factorised else net
    return _Corrected(net, [fedpara.client_mod], case.section)


@pytest.mark.in_turn
@pytest.mark.parametrize("lie", ["", "nothing private", "shared alone", "dense"])
@pytest.mark.parametrize("variate", ["none", "shared", "all"])
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
@pytest.mark.parametrize("case", FACTORS.values(), ids=FACTORS)
def test_corrections(case: Case, algorithm: str, variate: str, lie: str) -> None:
    """The change of a variate is the client's update of these tensors."""
    task = {"algorithm": algorithm, "round": 1, "accepted": -1, "correct": True, "bound": 0.0}
    config = ConfigRecord({**task, "option": "II", "alpha": 1.0})
    content: dict[str, Any] = {
        "arrays": LIES[lie](case) if lie else case.honest(),
        "fedpara.optimizer": config,
    }
    if variate != "none":
        names = case.state if variate == "all" else case.shared
        zeros = {name: torch.zeros_like(case.state[name]) for name in names}
        content["fedpara.variate"] = described(None, zeros)
    device = _corrected(case)
    replies = [device.send(content) for _ in range(2)]
    for reply in replies:
        assert case.secrets.found_in(reply.data) == 0
        for tensors in reply.tensors.values():
            assert case.secrets.found_among(tensors) == []
            assert not tensors.keys() & case.private
    if variate == "shared" and not lie and case.knows_model:
        assert replies[0].error == ""
