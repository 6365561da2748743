"""Secure aggregation on a real engine: the legacy SecAgg+ workflow under `flwr run`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedpara_plugins as fedpara
from harness.flower.deployment import simulated
from harness.flower.engine_app import EngineApp

CLIENTS = 3


@pytest.mark.parametrize("method", ["fedpara", "pfedpara"])
def test_a_masked_run_comes_to_what_the_plain_loop_does(tmp_path: Path, method: str) -> None:
    """To the workflow's own quantisation: each weight is rounded to steps of 6e-6 a round."""
    app = EngineApp(
        tmp_path,
        method=method,
        clients=CLIENTS,
        component="secagg_client_app",
        server_component="secagg_server_app",
    )
    finished = simulated(tmp_path / "run", app.path, app.config, nodes=CLIENTS).check()
    assert "left out" not in finished.log
    app.check_nothing_private_left(control=False)  # what is shared is masked
    app.check_close(within=0.01)
    plain = app.reference()
    assert app.figures["losses"] == pytest.approx(plain.losses, abs=2e-3)
    private = list(fedpara.split(app.build()).private)
    assert bool(private) == (method == "pfedpara")
    for client in range(CLIENTS):
        state = app.noted(client, app.task.rounds, "after")
        assert state is not None
        for name in private:
            own = plain.private[client][name]
            torch.testing.assert_close(state[name], own, rtol=0.01, atol=1e-4)
            assert not app.final[name].any()  # what the server holds of it is its own zero
    _check_only_the_shared_part_was_sent(app)


def _check_only_the_shared_part_was_sent(app: EngineApp) -> None:
    """Assert one masked number of 8 bytes per shared value in the uplinks, and no array."""
    values = sum(value.numel() for value in fedpara.split(app.build()).shared.values())
    for server_round in range(1, app.task.rounds + 1):
        sent = sum(
            entry.encoded_bytes
            for entry in app.ledger
            if (entry.direction, entry.round) == ("up", server_round)
        )
        assert 8 * values * CLIENTS <= sent <= 1.05 * 8 * values * CLIENTS
