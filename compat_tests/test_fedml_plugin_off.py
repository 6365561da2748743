"""With method and codec ``none`` every optimizer is FedML's own run: weights and accuracies."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch

from harness.fedml.project import arguments, dataset, model, run

KEYS: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "FedProx": {"fedprox_mu": 0.1},
    "FedOpt": {"server_optimizer": "adam", "server_lr": 0.01, "ci": 0},
    "SCAFFOLD": {"server_lr": 1.0, "initialize_all_clients": True},
    "FedDyn": {"feddyn_alpha": 0.1, "initialize_all_clients": True},
    "FedNova": {
        "gmf": 0.0,
        "mu": 0.0,
        "momentum": 0.9,
        "dampening": 0.0,
        "wd": 0.0,
        "nesterov": False,
        "ci": 0,
    },
    "Mime": {
        "mimelite": True,
        "server_optimizer": "sgd",
        "server_lr": 0.1,
        "server_momentum": 0.9,
        "momentum": 0.9,
        "ci": 0,
    },
    "HierarchicalFL": {
        "lr": 0.1,
        "wd": 0.0,
        "group_method": "random",
        "group_num": 2,
        "group_comm_round": 1,
        "client_num_per_round": 4,
    },
}


def figures(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record.msg for record in caplog.records if isinstance(record.msg, dict)]


@pytest.mark.parametrize("optimizer", KEYS)
def test_it_is_fedmls_own_run(optimizer: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    keys = {"federated_optimizer": optimizer, **KEYS[optimizer]}
    results = []
    for plain in (True, False):
        caplog.clear()
        torch.manual_seed(0)
        net = model()
        runner = _started(plain, net, keys)
        runner.run()
        assert type(runner.runner).__module__ == "fedml.simulation.simulator"
        state = {k: v.clone() for k, v in net.state_dict().items()}
        results.append((state, figures(caplog)))
    (theirs, logged), (ours, also) = results
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert also == logged
    assert logged or optimizer == "HierarchicalFL"
    assert "fedpara:" not in caplog.text


def _started(plain: bool, net: torch.nn.Module, keys: dict[str, Any]) -> Any:
    import fedml

    from fedpara_plugins_fedml import FedMLRunner

    kind = fedml.FedMLRunner if plain else FedMLRunner
    return kind(arguments(**keys), torch.device("cpu"), dataset(), net)


def test_options_without_a_method_or_codec_turn_nothing_on() -> None:
    outcome = run(fedpara_method="none", fedpara_codec="none", fedpara_gamma=0.3)
    assert type(outcome.runner.runner).__module__ == "fedml.simulation.simulator"


def test_files_that_nobody_would_write_are_told(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run(fedpara_ledger=str(tmp_path / "ledger.jsonl"), comm_round=1)
    assert "fedpara_ledger is without effect" in caplog.text
    assert not list(tmp_path.iterdir())
