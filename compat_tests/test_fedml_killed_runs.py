"""With ``fedpara_state_dir`` a killed FedML run continues: the server and its clients."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from safetensors.torch import load_file

from fedpara_plugins import ConfigError
from fedpara_plugins_fedml.engine.server_state import CompletedRound, ServerFile
from fedpara_plugins_fedml.rules import rule_for
from fedpara_plugins_fedml.settings import FedMLSettings
from harness.fedml.killed_run import FedMLRunRequest
from harness.fedml.project import arguments, run
from harness.matrix.smoke import matrix_only
from harness.processes.killed_runs import ForkServer, assert_equal, assert_little_repeated

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")

ROUNDS = 4
LESS_KEPT = "what it keeps, another case keeps too"


@pytest.fixture(scope="module")
def program() -> Iterator[ForkServer]:
    made = ForkServer("harness.fedml.killed_run")
    yield made
    made.end()


def keys(
    folder: Path | None, optimizer: str, method: str, codec: str, **more: Any
) -> dict[str, Any]:
    found = {
        "federated_optimizer": optimizer,
        "comm_round": ROUNDS,
        "server_optimizer": "adam",
        "server_lr": 0.05 if optimizer == "FedOpt" else 1.0,
        "feddyn_alpha": 0.3,
        "fedpara_method": method,
        "fedpara_codec": codec,
        "fedpara_gamma": 0.5,
        "fedpara_mend": True,
        **more,
    }
    return found if folder is None else {**found, "fedpara_state_dir": str(folder)}


@pytest.mark.parametrize(
    ("optimizer", "method", "codec"),
    [
        matrix_only("FedAvg", "none", "none", reason=LESS_KEPT),
        matrix_only("FedAvg", "pfedpara", "small", reason=LESS_KEPT),
        ("FedOpt", "fedpara", "balanced"),
        ("SCAFFOLD", "pfedpara", "small"),
        matrix_only("FedDyn", "fedpara", "none", reason=LESS_KEPT),
    ],
)
def test_a_run_killed_between_rounds_ends_as_if_it_had_not_been(
    program: ForkServer, tmp_path: Path, optimizer: str, method: str, codec: str
) -> None:
    """The optimizer's state, references, private factors, variates and error feedback all go on."""

    def request(name: str, die_before: int = 0) -> FedMLRunRequest:
        output = str(tmp_path / f"{name}.safetensors")
        return FedMLRunRequest(
            output, keys(tmp_path / name, optimizer, method, codec), die_before=die_before
        )

    whole = program.run(request("whole"))
    assert program.run(request("killed", die_before=2)) is None
    assert program.run(request("killed", die_before=4)) is None
    assert_equal(program.run(request("killed")), whole)
    log = (tmp_path / "killed.log").read_text()
    assert "holds round 3 of 4" in log
    assert "that lost it" not in log


def test_the_kept_round_is_what_makes_them_equal(program: ForkServer, tmp_path: Path) -> None:
    """The control: with Adam's moments forgotten the run ends elsewhere."""

    def request(name: str, die_before: int = 0) -> FedMLRunRequest:
        output = str(tmp_path / f"{name}.safetensors")
        made = keys(tmp_path / name, "FedOpt", "fedpara", "none")
        return FedMLRunRequest(output, made, die_before=die_before)

    whole = program.run(request("whole"))
    assert program.run(request("killed", die_before=3)) is None
    file = ServerFile(tmp_path / "killed")
    saved = file._decoded(tmp_path / "killed" / "server" / "round.safetensors")
    assert saved.round == 2
    assert saved.rule
    args = arguments(**keys(None, "FedOpt", "fedpara", "none"))
    fresh = rule_for(args, FedMLSettings.from_args(args), clients=4)
    file.write(replace(saved, rule=fresh.state_dict()))
    ended = program.run(request("killed"))
    assert whole is not None
    assert ended is not None
    assert max(float((ended[name] - value).abs().max()) for name, value in whole.items()) > 1e-3


@pytest.mark.parametrize(
    ("optimizer", "method", "codec"),
    [
        ("FedAvg", "pfedpara", "small"),
        matrix_only("SCAFFOLD", "fedpara", "none", reason=LESS_KEPT),
    ],
)
def test_a_run_killed_at_any_moment_goes_on(
    program: ForkServer, tmp_path: Path, optimizer: str, method: str, codec: str
) -> None:
    ledger = tmp_path / "ledger.jsonl"
    # Enough of them that some are left for further kills.
    many = {"comm_round": 12}
    made = keys(tmp_path / "state", optimizer, method, codec, fedpara_ledger=str(ledger), **many)
    request = FedMLRunRequest(str(tmp_path / "end.safetensors"), made)
    draw, killed = random.Random(optimizer), 0
    for _ in range(10):
        moment = {"die_after": draw.randint(1, 12), "moment": draw.uniform(0.0, 0.03)}
        killed += program.run(replace(request, **moment)) is None
    assert killed  # how often, depends on the machine: the first is certain
    state = program.run(request)
    whole = FedMLRunRequest(
        str(tmp_path / "whole.safetensors"), keys(None, optimizer, method, codec, **many)
    )
    assert_little_repeated(state, program.run(whole), ledger, many["comm_round"])


def test_a_finished_run_trains_no_further_and_writes_its_checkpoint_again(tmp_path: Path) -> None:
    made = keys(tmp_path / "state", "FedAvg", "fedpara", "none")
    path = tmp_path / "dense.safetensors"
    first = run(**made, fedpara_checkpoint=str(path))
    before = load_file(path)
    path.unlink()
    again = run(**made, fedpara_checkpoint=str(path))
    assert first.sent
    assert not again.sent
    assert_equal(load_file(path), before)


def test_rounds_of_another_optimizer_model_or_method_are_refused(tmp_path: Path) -> None:
    run(**keys(tmp_path, "FedAvg", "fedpara", "none"))
    for changed, words in (
        (keys(tmp_path, "FedDyn", "fedpara", "none"), "holds rounds of FedAvg"),
        (keys(tmp_path, "FedAvg", "lowrank", "none"), "another model: .*fedpara.*lowrank"),
        (keys(tmp_path, "FedAvg", "none", "none"), "fedpara.*there and method none here"),
    ):
        with pytest.raises(ConfigError, match=words):
            run(**changed)
    (tmp_path / "server" / "round.safetensors").write_bytes(b"nothing of ours")
    with pytest.raises(ConfigError, match=r"round\.safetensors is damaged"):
        run(**keys(tmp_path, "FedAvg", "fedpara", "none"))


def test_a_folder_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "server").write_text("a file where the folder should be")
    ServerFile(tmp_path).write(CompletedRound(3, {"w": torch.ones(2)}))
    assert "round 3 is not kept" in caplog.text
