"""Private values and Flower's legacy API, where positions stand for names."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord
from flwr.client.mod import secaggplus_mod

import fedpara_plugins_flower as fedpara
from harness.flower.hostile_cases import CASES, LIES, Case, check_nothing_left, check_refused
from harness.flower.hostile_server import Device, planted
from harness.processes.canaries import Canaries

EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
MODS = {
    "plugin": [fedpara.client_mod],
    "secagg first": [secaggplus_mod, fedpara.client_mod],
    "secagg last": [fedpara.client_mod, secaggplus_mod],
}
EACH_MODS = pytest.mark.parametrize("mods", MODS)

FIT = {"fitins.config": ConfigRecord({})}
EVALUATE = {"evaluateins.config": ConfigRecord({})}
ASK = {"getparametersins.config": ConfigRecord({})}
PROPERTIES = {"getpropertiesins.config": ConfigRecord({})}
ARRAYS = "parameters"


def _device(case: Case, mods: str = "plugin", **options: Any) -> Device:
    return case.device(legacy=True, mods=MODS[mods], **options)


@EACH_CASE
def test_the_search_finds_what_is_shared(case: Case) -> None:
    """The control: an honest list, whose private positions are left out."""
    device = _device(case)
    reply = device.send({ARRAYS: case.honest(), **FIT})
    check_nothing_left(case, reply)
    if not case.knows_model:
        check_refused(reply, before=False)
        assert "factorised" in reply.error
        return
    assert reply.error == ""
    if case.local == "factors":
        control = Canaries(planted(case.shared).values())
        assert control.found_in(reply.data) == len(control) > 50


@pytest.mark.in_turn
@pytest.mark.parametrize("loads", [True, False], ids=["loads", "ignores"])
@pytest.mark.parametrize("lie", LIES)
@EACH_MODS
@EACH_CASE
def test_a_lie(case: Case, mods: str, lie: str, loads: bool) -> None:
    """With and without a model that the client knows, and whether its app loads the list or not."""
    device, record = _device(case, mods, loads=loads), LIES[lie](case)
    sent = [
        ({ARRAYS: record, **FIT}, "train"),
        ({ARRAYS: case.honest(), **FIT}, "train"),
        ({ARRAYS: record, **FIT}, "train"),
        ({ARRAYS: record, **EVALUATE}, "evaluate"),
        (ASK, "get_parameters"),
    ]
    check_nothing_left(case, *(device.send(content, kind) for content, kind in sent))


@pytest.mark.parametrize("secagg", [None, {}, {"stage": "setup"}, {"stage": "unmask"}], ids=str)
@pytest.mark.parametrize("cached", [False, True], ids=["built anew", "cached"])
@EACH_MODS
@EACH_CASE
@pytest.mark.in_turn
def test_the_first_weights(case: Case, mods: str, cached: bool, secagg: Any) -> None:
    """Asked for at any time, with a record of SecAgg+ beside, or arrays that no one asked for."""
    more = {} if secagg is None else {"secaggplus_configs": ConfigRecord(secagg)}
    device = _device(case, mods, cached=cached)
    replies = [device.send({**ASK, **more}, "get_parameters")]
    replies += [device.send({ARRAYS: case.honest(), **FIT})]
    replies += [device.send({**ASK, **more}, "get_parameters")]
    for record in (case.honest(), LIES["nothing private"](case)):
        replies += [device.send({**ASK, ARRAYS: record, **more}, "get_parameters")]
    check_nothing_left(case, *replies)


@EACH_CASE
def test_the_first_weights_of_an_honest_run(case: Case) -> None:
    """What a client gives for the start: its shared part, if it knows what that is."""
    reply = _device(case).send(ASK, "get_parameters")
    check_nothing_left(case, reply)
    if not case.knows_model:
        check_refused(reply, before=False)
    else:
        assert reply.error == ""
        assert reply.tensors[ARRAYS].keys() == case.shared.keys()


@pytest.mark.in_turn
@pytest.mark.parametrize("lie", ["", "nothing private", "positions", "dense", "other order"])
@EACH_MODS
@EACH_CASE
def test_records_of_other_names(case: Case, mods: str, lie: str) -> None:
    record = LIES[lie](case) if lie else case.honest()
    device = _device(case, mods)
    contents: list[dict[str, Any]] = [
        FIT,
        {**FIT, "fitins.parameters": ArrayRecord({})},
        {**FIT, "fitins.parameters": record},
        {**FIT, "other": record, "fitins.parameters": ArrayRecord({})},
        {**FIT, ARRAYS: case.honest(), "other": record},
        {**FIT, "other": record, ARRAYS: case.honest()},
        {**FIT, ARRAYS: record, "fitins.parameters": case.honest()},
        {**FIT, "fedpara.variate": record},
        {**FIT, "secaggplus_configs": ConfigRecord()},
        {**FIT, ARRAYS: record, "secaggplus_configs": ConfigRecord()},
        {**FIT, ARRAYS: record, "secaggplus_configs": ConfigRecord({"stage": "setup"})},
    ]
    replies = [device.send(content) for content in contents]
    check_nothing_left(case, *replies, device.send(PROPERTIES, "get_properties"))
