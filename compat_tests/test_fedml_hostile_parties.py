"""One party of several that breaks the protocol: the others go on, and no file lies elsewhere.

Replies that cannot be used are in test_fedml_hostile_replies.py.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="FedML's environments only")

from fedml.core.distributed.communication.message import Message
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

from fedpara_plugins_fedml.transport.protocol import (
    FAILED,
    FINISH,
    HELLO,
    ONLINE,
    PLUGIN_FIELDS,
    TASK,
    Event,
)
from harness.fedml.threads import Parties

KEYS: dict[str, Any] = {
    "fedpara_method": "pfedpara",
    "fedpara_gamma": 0.3,
    "fedpara_init": "seeded",
    "fedpara_timeout": 10,
}
ENOUGH = {**KEYS, "fedpara_min_clients": 1}
ESCAPES = "\x1b[31mred\nfedpara: left out client 0\x07"


def hello(**fields: str) -> Message:
    message = Message(ONLINE, 2, 0)
    for key, value in {**PLUGIN_FIELDS, **fields}.items():
        message.add_params(key, value)
    return message


def stock() -> Message:
    """The first message of FedML's own client."""
    message = hello()
    message.get_params().pop("fedpara")
    return message


def failed() -> Message:
    message = Message(FAILED, 2, 0)
    message.add_params("reason", ESCAPES)
    return message


def disturbing(parties: Parties, messages: list[Message], number: int = 2) -> Any:
    """Return a trainer that sends other messages before it trains in a round."""

    class Trainer(ModelTrainerCLS):  # type: ignore[misc]
        def train(self, train_data: Any, device: Any, args: Any, **more: Any) -> None:
            if args.round_idx + 1 == number:
                for message in messages:
                    parties.transports[2].send_message(message)
            super().train(train_data, device, args, **more)

    return Trainer


@pytest.mark.parametrize(
    "messages",
    [
        [hello(session="x", error=ESCAPES)],
        [failed()],
        [stock()],
        [hello(session=f"{n}") for n in range(40)],
    ],
    ids=["an error", "a failure", "FedML's own message", "many sessions"],
)
def test_a_disturbance_in_a_round_ends_nobody_elses_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, messages: list[Message]
) -> None:
    parties = Parties(monkeypatch, keys=ENOUGH)
    parties._trainers = {2: disturbing(parties, messages)}
    with caplog.at_level(logging.INFO, "fedpara.fedml"):
        parties.run()
    assert not {0, 1} & parties.errors.keys()
    assert "left out client 1 in round" in caplog.text
    assert "left out client 0" not in [r.getMessage()[9:26] for r in caplog.records]
    for record in caplog.records:
        assert record.getMessage().isprintable()
    tasks = [m for m in parties.transports[0].sent if m.get_type() == TASK]
    assert len(tasks) <= 3 * (1 + 6)


@pytest.mark.parametrize("message", [hello(session="x", error=ESCAPES), stock()])
def test_a_disturbance_at_the_start(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, message: Message
) -> None:
    """The client never takes part; its message comes before that of the other one."""
    parties = Parties(monkeypatch, keys=ENOUGH)
    sender = type(parties.start_server())(2, parties.transports)
    threading.Thread(target=sender.handle_receive_message, daemon=True).start()
    sender.send_message(message)
    parties.start(1)
    parties.wait(0, 1)
    sender.stop_receive_message()
    assert not parties.errors
    assert any(m.get_type() == FAILED or "plugin" in str(m.get_type()) for m in _to(parties, 2))


def _to(parties: Parties, peer: int) -> list[Message]:
    return [m for m in parties.transports[0].sent if m.get_receiver_id() == peer]


def test_a_flood_does_not_stop_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    parties = Parties(monkeypatch, keys={**ENOUGH, "fedpara_start_timeout": 3})
    sender = type(parties.start_server())(2, parties.transports)
    done = threading.Event()
    threading.Thread(target=sender.handle_receive_message, daemon=True).start()

    def flood() -> None:
        while not done.wait(0.05):
            sender.send_message(Message(9008, 2, 0))

    threading.Thread(target=flood, daemon=True).start()
    try:
        parties.wait(0)
    finally:
        done.set()
        sender.stop_receive_message()
    assert "has not come within 3 s" in str(parties.errors[0])


@pytest.mark.parametrize("names", ["../../stolen", "0 /tmp/stolen", "7", "-1", "0 ../1"])
def test_a_server_chooses_no_place_of_a_clients_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, names: str
) -> None:
    """Its last message names silos, of which each has files."""
    folders = {"fedpara_client_checkpoints": str(tmp_path / "a" / "b" / "own")}
    parties = Parties(monkeypatch, 1, keys=KEYS, of_rank={1: folders})

    def forged(message: Message) -> Message:
        if message.get_type() == FINISH and message.get("silos"):
            message.add_params("silos", names)
        return message

    parties.start_server(forged)
    parties.start(1)
    parties.wait()
    assert not parties.errors
    written = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert written <= {Path("a/b/own/client-0.safetensors")}


@pytest.mark.parametrize("silo", [-1, 7, 10**9])
def test_a_task_of_no_silo_makes_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, silo: int
) -> None:
    parties = Parties(
        monkeypatch, 1, keys=KEYS, of_rank={1: {"fedpara_state_dir": str(tmp_path / "state")}}
    )

    def forged(message: Message) -> Message:
        if message.get_type() == TASK:
            message.add_params("silo", silo)
        return message

    parties.start_server(forged)
    parties.start(1)
    parties.wait()
    assert "its reply names the silo" in str(parties.errors[0])
    assert not list((tmp_path / "state" / "clients").glob("*"))


def test_received_text_is_one_line() -> None:
    event = Event(HELLO, 1, fields={"error": ESCAPES + "x" * 10**5})
    assert event.text("error").isprintable()
    assert len(event.text("error")) < 9000
