"""One hostile client of four, on FedML: its replies are left out by name, and nobody else's are.

A run has one attack a round, so that a table of them costs little more than one run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.core.distributed.communication.message import Message
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins_fedml.messages.envelope import pack, unpack
from fedpara_plugins_fedml.messages.head import Head
from fedpara_plugins_fedml.seams import MODEL_KEY
from fedpara_plugins_fedml.transport.protocol import REPLY
from harness.fedml.hostile import ENVELOPES, GRADIENTS, STEPS, VARIATES, Attack, one
from harness.fedml.project import Sent, run
from harness.fedml.threads import Parties

CULPRIT = "2"
PERSONAL = {"fedpara_method": "pfedpara", "fedpara_gamma": 0.5, "client_num_per_round": 4}
TABLES = {
    "FedAvg": ENVELOPES,
    "SCAFFOLD": VARIATES,
    "FedNova": STEPS,
    "Mime": GRADIENTS,
}


def failed(data: bytes) -> bytes:
    """Return the message of a client that could not train."""
    head = Head.from_json(unpack(data).head)
    return pack(head.failed(RuntimeError("out of memory"), fatal=False).to_json(), {})


Lines = list[tuple[int, str]]


def attacked_run(
    attacks: Callable[[int], Attack], **keys: Any
) -> tuple[dict[str, Tensor], Lines, Exception | None]:
    """Run with attacks of the culprit, by round; return state, warnings by round, and the error."""
    lines: Lines = []
    now = [0]

    def tap(sent: Sent) -> Any:
        now[0] = sent.round
        mine = (sent.direction, sent.client) == ("up", CULPRIT)
        return attacks(sent.round)(sent.data) if mine else sent.data

    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append((now[0], record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("fedpara.fedml")
    logger.addHandler(handler)
    try:
        return run(tap=tap, **{**PERSONAL, **keys}).state, lines, None
    except Exception as error:
        return {}, lines, error
    finally:
        logger.removeHandler(handler)


def rules(optimizer: str) -> dict[str, Any]:
    if optimizer == "Mime":
        return {"federated_optimizer": "Mime", "mimelite": True, "server_optimizer": "sgd"}
    return {"federated_optimizer": optimizer, "fedpara_guard_collect": 0, "gmf": 0.5}


@cache
def attacked(optimizer: str) -> tuple[dict[str, Tensor], Lines, Exception | None]:
    attacks = [attack for attack, _ in TABLES[optimizer].values()]
    return attacked_run(
        lambda number: attacks[number - 1], comm_round=len(attacks), **rules(optimizer)
    )


CASES = [(optimizer, name) for optimizer, table in TABLES.items() for name in table]


@pytest.mark.parametrize(("optimizer", "name"), CASES)
def test_a_hostile_reply_is_left_out_and_named(optimizer: str, name: str) -> None:
    table = TABLES[optimizer]
    number, says = list(table).index(name) + 1, table[name][1]
    _, lines, error = attacked(optimizer)
    mine = [line for place, line in lines if place == number and f"client {CULPRIT}" in line]
    mine = [line for line in mine if "undone here" not in line]  # the client's own
    assert mine, error
    assert any(re.search(says, line) for line in mine), mine
    assert len(mine) == 1
    assert "\n" not in mine[0]
    others = [line for place, line in lines if place == number and "left out" in line]
    assert others == mine or optimizer == "Mime"


@pytest.mark.parametrize("optimizer", TABLES)
def test_hostile_replies_leave_no_trace(optimizer: str) -> None:
    """The model is that of the other three clients."""
    state, _, error = attacked(optimizer)
    assert error is None
    rounds = len(TABLES[optimizer])
    expected, _, _ = attacked_run(lambda number: failed, comm_round=rounds, **rules(optimizer))
    assert state
    assert len(ENVELOPES) >= 34
    if optimizer == "Mime":  # its model counts where its gradient alone is of no use
        return
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)


# Configuration


def test_one_client_cannot_end_the_run_by_calling_an_error_fatal() -> None:
    fatal = ENVELOPES["an error of configuration"][0]
    state, lines, error = attacked_run(lambda number: fatal, comm_round=2)
    assert error is None
    assert state
    assert len([line for _, line in lines if "misconfigured" in line]) == 2


def test_if_all_clients_do_the_run_ends_with_that_reason() -> None:
    fatal = ENVELOPES["an error of configuration"][0]
    with pytest.raises(ConfigError, match="client 0: misconfigured"):
        run(tap=lambda s: fatal(s.data) if s.direction == "up" else s.data, **PERSONAL)


def test_a_round_with_too_few_replies_says_so() -> None:
    keys = {**PERSONAL, "fedpara_min_clients": 4}
    _, _, error = attacked_run(lambda number: ENVELOPES["float8"][0], **keys)
    assert isinstance(error, FedParaError)
    assert "round 1 has 3 usable answers of 4 clients, 4 needed" in str(error)
    assert f"client {CULPRIT}" in str(error)
    assert "float8" in str(error)


# Outliers


@pytest.mark.parametrize("option", ["warn", "leave_out", "ignore"])
def test_an_absurd_update_is_named_and_left_out_if_asked(option: str) -> None:
    attack = one(lambda tensor: torch.full_like(tensor, 1e12))
    keys = {"comm_round": 1, "fedpara_outliers": option}
    state, lines, error = attacked_run(lambda number: attack, **keys)
    assert error is None
    named = [line for _, line in lines if "far outside" in line]
    assert len(named) == (option != "ignore")
    assert all(f"client {CULPRIT}" in line and "norm" in line for line in named)
    expected, _, _ = attacked_run(lambda number: failed, comm_round=1)
    same = all(torch.allclose(state[name], value) for name, value in expected.items())
    assert same == (option == "leave_out")


def test_honest_clients_are_not_named() -> None:
    _, lines, error = attacked_run(lambda number: lambda data: data, comm_round=4)
    assert error is None
    assert not lines


# Several processes

SILO: dict[str, Callable[[Message], Any]] = {
    "no silo": lambda m: m.get_params().pop("silo"),
    "a silo of text": lambda m: m.add_params("silo", "1"),
    "a silo that nobody asked": lambda m: m.add_params("silo", 77),
    "a flag as a silo": lambda m: m.add_params("silo", True),
    "no data": lambda m: m.get_params().pop(MODEL_KEY),
    "FedML's own reply": lambda m: m.add_params("msg_type", 3),
    **{
        name: (lambda m, attack=attack: m.add_params(MODEL_KEY, attack(m.get(MODEL_KEY))))
        for name, (attack, _) in ENVELOPES.items()
        if name in ("float8", "complex NaN", "no bytes", "an error of configuration")
    },
}


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("name", SILO)
def test_a_hostile_client_process_is_left_out_and_the_run_goes_on(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = {"fedpara_method": "pfedpara", "fedpara_gamma": 0.5, "comm_round": 2}
    parties = Parties(monkeypatch, 3, keys={**keys, "fedpara_timeout": 30})

    def altered(message: Message) -> Message:
        if message.get_type() == REPLY:
            SILO[name](message)
        return message

    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        for rank in (0, 1, 2, 3):
            parties.start(rank)
        while 2 not in parties.transports:
            pass
        parties.transports[2].altered = altered
        parties.wait()
    assert not parties.errors
    lines = [r.getMessage() for r in caplog.records if "left out client" in r.getMessage()]
    assert len(lines) == 2
    assert all("left out client 1 in round" in line for line in lines)
