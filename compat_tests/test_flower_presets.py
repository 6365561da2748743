"""The coarse presets: error feedback on the clients, and an entropy coder that both sides have."""

from __future__ import annotations

import pytest
import torch

import fedpara_plugins.exchange.client_round as client_round
from fedpara_plugins.codecs import decoders, peek_header
from fedpara_plugins.exchange import ClientState
from harness.cells.flower import GAMMA
from harness.flower.apps import Experiment, Outcome, federate, plugin_apps
from harness.flower.inprocess_grid import Sent
from harness.oracles.task import TrainingTask

TASK = TrainingTask(rounds=6, epochs=1)


def _run(codec: str, method: str = "fedpara", task: TrainingTask = TASK) -> Outcome:
    section = {"fedpara.method": method, "fedpara.gamma": GAMMA, "fedpara.codec": codec}
    return federate(plugin_apps(Experiment(task, "fedavg", {})), section)


def _codec(sent: Sent) -> str:
    (record,) = sent.arrays.values()
    (array,) = record.values()
    return peek_header(array.numpy().tobytes()).codec


def _train(outcome: Outcome, direction: str, server_round: int) -> list[Sent]:
    wanted = (direction, "train", server_round)
    return [s for s in outcome.sent if (s.direction, s.kind, s.round) == wanted]


@pytest.mark.in_turn
@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
@pytest.mark.parametrize("codec", ["balanced", "small"])
def test_presets_learn_as_the_uncoded_run_does(codec: str, method: str) -> None:
    plain, coded = _run("none", method), _run(codec, method)
    if method == "pfedpara":  # the server's W1 is nobody's model; the clients' own count
        was, now = plain.client_accuracies[6], coded.client_accuracies[6]
        start = plain.client_accuracies[1]
    else:
        was, now, start = plain.accuracies[-1], coded.accuracies[-1], plain.accuracies[0]
    assert was > start + 0.2
    # A coarse codec is behind at first; it has to have gone most of the way.
    assert now > start + 0.7 * (was - start)
    fewer = sum(s.array_bytes for s in plain.sent) / sum(s.array_bytes for s in coded.sent)
    assert fewer > (2.5 if codec == "balanced" else 4)


def test_the_entropy_coder_is_zlib_until_the_other_side_is_known() -> None:
    outcome = _run("small", task=TrainingTask(rounds=2, epochs=1))
    best = "ans" if "ans" in decoders() else "zstd" if "zstd" in decoders() else "zlib"
    assert all(_codec(s).endswith("zlib") for s in _train(outcome, "down", 1))
    # The first message to a client lists what the server decodes, its reply what the client does.
    assert all(_codec(s) == f"delta+quantise+{best}" for s in _train(outcome, "up", 1))
    assert all(_codec(s) == f"delta+quantise+{best}" for s in _train(outcome, "down", 2))
    assert [
        line
        for line in outcome.log
        if f"downlink codec in use: delta+quantise:rms=2+{best}" in line
    ]


def test_a_side_without_the_better_coders_gets_what_it_can_decode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_round, "readable", lambda: ("zlib",))
    outcome = _run("small", task=TrainingTask(rounds=2, epochs=1))
    assert all(_codec(s) == "delta+quantise+zlib" for s in _train(outcome, "down", 2))


def test_what_a_coarse_uplink_lost_is_sent_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Feedback lives in the client's state; forgotten each round, the run ends elsewhere."""
    outcome = _run("small")
    for partition in range(TASK.clients):
        kept = outcome.grid.client_state(partition).array_records
        assert any("residual" in name for name in kept)
    monkeypatch.setattr(ClientState, "residual", lambda self, record: None)
    forgetful = _run("small")
    assert not all(
        torch.equal(outcome.state[name], forgetful.state[name]) for name in outcome.state
    )
    assert outcome.losses[-1] < forgetful.losses[-1]
