"""Descriptions of a curious server: none of them makes a client send private values."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import ConfigRecord

from harness.flower.hostile_cases import CASES, LIES, Case, check_nothing_left, check_refused
from harness.flower.hostile_server import Described, planted
from harness.processes.canaries import Canaries

EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EACH_LIE = pytest.mark.parametrize("lie", LIES)
KINDS = ["evaluate", "query", "train.special", "query.special"]
UNRELATED = ("wrapped", "positions")
"""No name of the client's model is in them: as far as the client knows, they are no model, so its
code may see them; its reply is refused where it holds private values."""


def _is_true(record: Described, case: Case) -> bool:
    model = record.model or {}
    return bool(model.get("fingerprint") == case.spec.fingerprint)


def _may_be_read(lie: str, case: Case) -> bool:
    """Return whether the client's code may see a record, since nothing in it is private.

    A model without the private part is a part of it, as other apps send.
    """
    return lie in UNRELATED or (lie == "shared alone" and not case.spec.weights)


@EACH_CASE
def test_the_search_finds_what_is_shared(case: Case) -> None:
    """The control of all tests below: the same search, in the same traffic."""
    reply = case.device().send({"arrays": case.honest()})
    check_nothing_left(case, reply)
    if case.local == "dense" and not case.knows_model:
        check_refused(reply, before=False)
        assert "factorised" in reply.error
        return
    assert reply.error == ""
    shared = planted(case.shared)
    if case.local == "dense":  # which answers with factors that it has not trained
        shared = {name: shared[name] for name in ("body.bias", "norm.weight", "head.bias")}
    control = Canaries(shared.values())
    assert control.found_in(reply.data) == len(control) > 50
    assert control.found_among(reply.tensors["arrays"]) == list(shared)


@EACH_CASE
def test_the_search_finds_private_values_where_they_are_kept(case: Case) -> None:
    device = case.device()
    if device.send({"arrays": case.honest()}).error == "" and case.local != "dense":
        state = device.grid.client_state(0)
        arrays = [a.data for record in state.array_records.values() for a in record.values()]
        values = Canaries(planted({k: case.state[k] for k in case.private}).values())
        assert values.found_in(b"".join(arrays)) == len(values)


@pytest.mark.in_turn
@EACH_LIE
@EACH_CASE
def test_a_lie_after_an_honest_message_is_refused(case: Case, lie: str) -> None:
    """The client knows its own model by then, if its code builds it with the plugin."""
    device = case.device()
    first = device.send({"arrays": case.honest()})
    record = LIES[lie](case)
    second, again = (device.send({"arrays": each}) for each in (record, case.honest()))
    check_nothing_left(case, first, second, again)
    if case.knows_model and not _is_true(record, case):
        check_refused(second, before=not _may_be_read(lie, case))
        assert again.error == ""


@pytest.mark.in_turn
@EACH_LIE
@EACH_CASE
def test_a_lie_as_the_first_message(case: Case, lie: str) -> None:
    device = case.device()
    record = LIES[lie](case)
    replies = [device.send({"arrays": record}) for _ in range(2)]
    check_nothing_left(case, *replies)
    if case.knows_model and not _is_true(record, case):
        check_refused(replies[0], before=False)


@pytest.mark.in_turn
@pytest.mark.parametrize("order", ["first", "last", "first, secagg", "last, secagg"])
@EACH_LIE
@EACH_CASE
def test_a_lie_beside_an_honest_record(case: Case, lie: str, order: str) -> None:
    record = LIES[lie](case)
    content: dict[str, Any] = {"arrays": case.honest(), "more": record}
    if order.startswith("first"):
        content = {"more": record, "arrays": case.honest()}
    if order.endswith("secagg"):
        content["secaggplus_configs"] = ConfigRecord()
    device = case.device()
    replies = [device.send(content), device.send({"arrays": case.honest()}), device.send(content)]
    check_nothing_left(case, *replies)
    if case.knows_model and not _is_true(record, case):
        check_refused(replies[0], before=False)
        check_refused(replies[2], before=not _may_be_read(lie, case))


@pytest.mark.in_turn
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lie", ["nothing private", "dense", "fedpara", "one layer"])
@EACH_CASE
def test_a_lie_in_every_type_of_message(case: Case, lie: str, kind: str) -> None:
    device = case.device()
    record = LIES[lie](case)
    first = device.send({"arrays": record}, kind)
    honest = device.send({"arrays": case.honest()}, kind)
    last = device.send({"arrays": record}, kind)
    check_nothing_left(case, first, honest, last)
    if case.knows_model and not _is_true(record, case):
        check_refused(first, before=False)
        check_refused(last)
