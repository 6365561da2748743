"""A server that is killed at any moment and started again goes on."""

from __future__ import annotations

import base64
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fedpara_plugins
from fedpara_plugins.references import ClientReferences, LostReferenceError

KILLS = 25
CLIENTS = "abc"

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")


class Server:
    """One living server at a time, of a process that forks them."""

    def __init__(self, scheme, folder):
        self.order = json.dumps([scheme, str(folder)])
        root = Path(fedpara_plugins.__file__).parents[1]
        path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("server_process.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        self.start()

    def start(self):
        self.write(f"start {self.order}")
        self.pid = self.read()["ready"]

    def write(self, line):
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read(self):
        return json.loads(self.process.stdout.readline())

    def ask(self, **order):
        self.write(json.dumps(order))
        return self.read()

    def ask_and_kill(self, delay, **order):
        """Return the answer, if it was complete before the server died; without a delay, it was."""
        self.write(json.dumps(order))
        answer = [self.process.stdout.readline()] if delay is None else []
        time.sleep(delay or 0)
        os.kill(self.pid, signal.SIGKILL)
        lines = answer
        while not lines or lines[-1] != b"dead\n":
            lines.append(self.process.stdout.readline())
        self.start()
        whole = [line for line in lines[:-1] if line.endswith(b"}\n")]
        return json.loads(whole[0]) if whole else None

    def end(self):
        os.kill(self.pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def receive(client, answer):
    received = client.receive("model", base64.b64decode(answer["payload"]), limit=10**7)
    assert received.reference == answer["reference"]
    return received


def served(server, clients, name, number):
    """A round without accidents, after whatever has happened before; the kinds of its messages."""
    kinds = []
    for _ in range(2):
        answer = server.ask(do="encode", client=name, number=number)
        kinds.append(answer["kind"])
        try:
            received = receive(clients[name], answer)
        except LostReferenceError as lost:
            server.ask(do="refused", client=name, holds=list(lost.holds))
            continue
        clients[name].keep("model", received)
        assert server.ask(do="acknowledge", client=name, held=received.reference)["known"]
        return kinds
    raise AssertionError("not served within the round")


@pytest.mark.parametrize("scheme", ["per client", "grid"])
def test_kill_at_random_points(scheme, tmp_path):
    draw = random.Random(0)
    clients = {name: ClientReferences() for name in CLIENTS}
    server = Server(scheme, tmp_path)
    answered = 0
    try:
        for name in CLIENTS:
            assert served(server, clients, name, 0) == ["first"]
        for number in range(1, KILLS + 1):
            name = draw.choice(CLIENTS)
            # An encode takes some milliseconds: some kills fall before it, some amid, some after;
            # the last one after it on any machine.
            delay = draw.choice([0, 0.002, 0.004, 0.008, 0.015, 0.03, 0.1])
            delay = None if number == KILLS else delay
            if draw.random() < 0.6 or delay is None:
                order = {"do": "encode", "client": name, "number": number}
                answer = server.ask_and_kill(delay, **order)
                answered += answer is not None
                if answer is not None and draw.random() < 0.7:
                    clients[name].keep("model", receive(clients[name], answer))
            else:
                answer = server.ask(do="encode", client=name, number=number)
                received = receive(clients[name], answer)
                clients[name].keep("model", received)
                order = {"do": "acknowledge", "client": name, "held": received.reference}
                server.ask_and_kill(delay, **order)
            # Nothing that was acknowledged is lost: no client pays a full model for the death.
            for other in CLIENTS:
                assert set(served(server, clients, other, number)) <= {"update", "repeat"}
    finally:
        server.end()
    assert answered > 0


@pytest.mark.parametrize("scheme", ["per client", "grid"])
def test_a_folder_that_is_gone_costs_one_full_coded_downlink_each(scheme, helpers, tmp_path):
    exchange = helpers.Exchange(helpers.SCHEMES[scheme](folder=tmp_path / "old"))
    for name in CLIENTS:
        exchange.round(name)
    exchange.state = helpers.moved(exchange.state, 1)
    exchange.downlink = helpers.SCHEMES[scheme](folder=tmp_path / "new")
    for name in CLIENTS:
        assert [message.kind for message in exchange.round(name)[0]] == ["first"]
    exchange.state = helpers.moved(exchange.state, 2)
    for name in CLIENTS:
        assert [message.kind for message in exchange.round(name)[0]] == ["update"]


@pytest.mark.parametrize("scheme", ["per client", "grid"])
def test_damaged_tables_are_set_aside_and_said(scheme, helpers, tmp_path, caplog):
    exchange = helpers.Exchange(helpers.SCHEMES[scheme](folder=tmp_path))
    exchange.round("a")
    exchange.downlink.close()
    for path in tmp_path.glob("*.sqlite"):
        path.write_bytes(b"no database at all" * 100)
    exchange.state = helpers.moved(exchange.state, 1)
    exchange.downlink = helpers.SCHEMES[scheme](folder=tmp_path)
    assert "one full coded downlink" in caplog.text
    assert [message.kind for message in exchange.round("a")[0]] == ["first"]
    assert list(tmp_path.glob("*.damaged"))


def test_states_that_are_gone_are_said(helpers, tmp_path, caplog):
    exchange = helpers.Exchange(helpers.SCHEMES["per client"](folder=tmp_path))
    exchange.round("a")
    exchange.downlink.close()
    for path in tmp_path.glob("states/*"):
        path.unlink()
    exchange.state = helpers.moved(exchange.state, 1)
    exchange.downlink = helpers.SCHEMES["per client"](folder=tmp_path)
    assert "1 references are gone" in caplog.text
    assert "one full coded downlink" in caplog.text
    assert [message.kind for message in exchange.round("a")[0]] == ["first"]
