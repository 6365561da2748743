"""Runs in Flower's simulation engine on Ray, through `flwr run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.deployment import simulated
from harness.engine_app import EngineApp


@pytest.mark.parametrize(("method", "codec"), [("fedpara", "none"), ("pfedpara", "balanced")])
def test_a_simulated_run_equals_the_plain_loop(tmp_path: Path, method: str, codec: str) -> None:
    app = EngineApp(tmp_path, method=method, codec=codec, clients=3)
    finished = simulated(tmp_path / "run", app.path, app.config, nodes=3).check()
    app.check_everyone_took_part(finished.log)
    if codec == "none":
        app.check_equal()
    else:
        app.check_close()
