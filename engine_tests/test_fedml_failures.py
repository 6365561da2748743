"""Parties that fail: the round continues without them, or the run ends everywhere with a reason."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from harness.fedml.deployment import FedMLDeployment
from harness.fedml.requirements import skip_without
from harness.processes.supervisor import wait_until

FEDPARA = {"method": "fedpara", "gamma": 0.3, "codec": "balanced", "timeout": 20}
NOT_MPI = ("TRPC", "GRPC", "MQTT_S3")
LIMIT = 600.0
"""Seconds that a run may take to end; nothing is asserted about how long it really takes."""


def check_ended(
    engine: FedMLDeployment, reason: Iterable[str], killed: str = "", stock: str = ""
) -> None:
    """Assert that all processes have failed, and that each one that could has said why.

    FedML's own may end with code 0: where its loop is a thread, only that ends with the error.
    """
    codes = engine.wait(LIMIT)
    assert all(code for name, code in codes.items() if name != stock), codes
    for name in codes:
        if name != killed:
            for words in reason:
                assert words in engine.programs[name].text, (name, engine.programs[name].tail(20))


@pytest.mark.parametrize("backend", ["TRPC", "MPI", "GRPC"])
def test_a_bad_client_costs_its_answer_only(tmp_path: Path, backend: str) -> None:
    """A training that raises, NaN, no message at all, half a message: one round each."""
    skip_without(backend)
    trouble = {"raises": 1, "nan": 2, "garbage": 3, "cut": 4}
    words = ";".join(f"client 2 round {number} {what}" for what, number in trouble.items())
    train = {"comm_round": 5, "learning_rate": 0.1}
    with FedMLDeployment(tmp_path, backend, plugin=FEDPARA, train=train, trouble=words) as engine:
        engine.finished()
        log = engine.text("server")
        for number in trouble.values():
            assert f"left out client 1 in round {number}: " in log  # the silo of process 2
        assert "the disk is full" in log
        assert "left out client 1 in round 5" not in log
        assert "left out client 0" not in log
    assert all(torch.isfinite(value).all() for value in engine.final.values())


@pytest.mark.parametrize("backend", ["TRPC", "GRPC", "MQTT_S3"])
def test_a_client_that_is_killed_and_needed_ends_the_run(tmp_path: Path, backend: str) -> None:
    skip_without(backend)
    words, plugin = "client 2 round 2 dies", {**FEDPARA, "min_clients": 2}
    with FedMLDeployment(tmp_path, backend, plugin=plugin, trouble=words) as engine:
        engine.start_all()
        check_ended(engine, ["client 2 is gone", "2 needed (fedpara_min_clients)"], "client-2")


def test_a_process_that_is_killed_under_mpirun(tmp_path: Path) -> None:
    """Open MPI itself ends all processes of its job, and says so."""
    skip_without("MPI")
    with FedMLDeployment(
        tmp_path, "MPI", plugin=FEDPARA, trouble="client 2 round 2 dies"
    ) as engine:
        engine.start_all()
        check_ended(engine, ["signal 9"])


@pytest.mark.parametrize("backend", ["TRPC", "GRPC"])
def test_a_client_that_is_killed_and_can_be_spared(tmp_path: Path, backend: str) -> None:
    skip_without(backend)
    train = {"comm_round": 4, "learning_rate": 0.1}
    words = "client 2 round 2 dies"
    with FedMLDeployment(tmp_path, backend, plugin=FEDPARA, train=train, trouble=words) as engine:
        engine.start_all()
        codes = engine.wait(LIMIT)
        assert codes.pop("client-2") == -9
        assert codes == {"server": 0, "client-1": 0}, engine.programs["server"].tail()
        log = engine.text("server")
        for number in (2, 3, 4):
            assert f"left out client 1 in round {number}" in log
    assert engine.checkpoint.exists()


@pytest.mark.parametrize("backend", ["TRPC", "GRPC"])
def test_a_server_that_is_killed_ends_the_clients(tmp_path: Path, backend: str) -> None:
    skip_without(backend)
    with FedMLDeployment(
        tmp_path, backend, plugin=FEDPARA, trouble="server round 2 dies"
    ) as engine:
        engine.start_all()
        check_ended(engine, ["the server is gone"], "server")


def test_an_error_of_the_server_is_told_to_all(tmp_path: Path) -> None:
    skip_without("GRPC")
    with FedMLDeployment(
        tmp_path, "GRPC", plugin=FEDPARA, trouble="server round 2 raises"
    ) as engine:
        engine.start_all()
        check_ended(engine, ["no such column"])


# Two sides that do not fit


def check_left_out(engine: FedMLDeployment, reason: str, *, culprit: int | None) -> None:
    """Assert that all others have ended well, without client 2, which is named with the reason.

    Args:
        engine: its run.
        reason: in the server's lines.
        culprit: client 2's exit code; None for any.
    """
    codes = engine.wait(LIMIT)
    found = codes.pop("client-2", 0)
    assert not any(codes.values()), (codes, engine.tail("server"))
    assert found == (found if culprit is None else culprit)
    log = engine.text("server")
    for number in (1, 2, 3):
        line = next(w for w in log.splitlines() if f"left out client 1 in round {number}: " in w)
        assert reason in line, line
    assert "left out client 0" not in log
    assert engine.checkpoint.exists()


DIFFERENT = [
    ({"gamma": 0.5}, "gamma", 0),
    ({"codec": "int8"}, "fedpara_codec", 0),
    ({"method": "lowrank"}, "method", 0),
    ({"gama": 0.3}, "did you mean fedpara_gamma", 1),
]
"""Options of one client, the words in the log, and its exit code."""


@pytest.mark.parametrize(("changed", "reason", "code"), DIFFERENT)
def test_a_client_that_is_set_up_differently_is_left_out(
    tmp_path: Path, changed: dict[str, object], reason: str, code: int
) -> None:
    """If its options can be read it takes part, in vain; else it ends at once."""
    skip_without("GRPC")
    other = {2: {**FEDPARA, **changed}}
    with FedMLDeployment(tmp_path, "GRPC", plugin=FEDPARA, of_rank=other) as engine:
        engine.start_all()
        check_left_out(engine, reason, culprit=code)


@pytest.mark.parametrize("backend", ["TRPC", "MPI", "MQTT_S3"])
def test_the_same_over_another_transport(tmp_path: Path, backend: str) -> None:
    """Under mpirun it stays until the end: any other end of one process is the end of all."""
    skip_without(backend)
    other = {2: {**FEDPARA, "gama": 0.3}}
    with FedMLDeployment(tmp_path, backend, plugin=FEDPARA, of_rank=other) as engine:
        engine.start_all()
        check_left_out(engine, "did you mean fedpara_gamma", culprit=int(backend != "MPI"))
        if backend == "MPI":
            assert "The run goes on without this client, which waits" in engine.text("server")


@pytest.mark.parametrize(("changed", "reason"), [DIFFERENT[0][:2], DIFFERENT[3][:2]])
def test_if_all_clients_are_the_run_ends_with_that_reason(
    tmp_path: Path, changed: dict[str, object], reason: str
) -> None:
    skip_without("GRPC")
    of_rank = {rank: {**FEDPARA, **changed} for rank in (1, 2)}
    with FedMLDeployment(tmp_path, "GRPC", plugin=FEDPARA, of_rank=of_rank) as engine:
        engine.start_all()
        check_ended(engine, [reason])


def test_a_client_without_the_plugin_under_mpirun(tmp_path: Path) -> None:
    """FedML's own message ends it with the others."""
    skip_without("MPI")
    with FedMLDeployment(tmp_path, "MPI", plugin=FEDPARA, of_rank={2: None}) as engine:
        engine.start_all()
        check_left_out(engine, "client 2 runs without the plugin", culprit=0)


@pytest.mark.parametrize("backend", NOT_MPI)
def test_a_client_without_the_plugin(tmp_path: Path, backend: str) -> None:
    """FedML's own client ends, with the reason as an unknown type in its log; the others go on.

    It says that it is there once; a broker has forgotten that when the server comes later.
    """
    skip_without(backend)
    with FedMLDeployment(tmp_path, backend, plugin=FEDPARA, of_rank={2: None}) as engine:
        if backend == "MQTT_S3":
            first = engine.start(2)
            wait_until(lambda: "MQTT msg sent" in first.text, seconds=LIMIT, what="client 2 is up")
            engine.start(0)
            engine.start(1)
        else:
            engine.start_all()
        check_left_out(engine, "client 2 runs without the plugin", culprit=None)
        assert "client 2 runs without the plugin" in engine.text("client-2")


@pytest.mark.parametrize("backend", NOT_MPI)
def test_a_server_without_the_plugin(tmp_path: Path, backend: str) -> None:
    """FedML's own server ends as well, with the reason as an unknown type in its log."""
    skip_without(backend)
    with FedMLDeployment(tmp_path, backend, plugin=FEDPARA, of_rank={0: None}) as engine:
        engine.start_all()
        check_ended(engine, ["the server runs without the plugin"], stock="server")


def test_a_server_without_the_plugin_that_is_slow(tmp_path: Path) -> None:
    """On TRPC FedML's own takes messages before it is ready for them; none must come that soon."""
    words, of_rank = "server round 1 is-late", {0: None}
    with FedMLDeployment(
        tmp_path, "TRPC", plugin=FEDPARA, of_rank=of_rank, trouble=words
    ) as engine:
        engine.start_all()
        check_ended(engine, ["the server runs without the plugin"], stock="server")
