"""Runs in Flower's simulation engine on Ray, through `flwr run`."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.cells.engines import ENGINE_CELLS, EngineCell
from harness.flower.deployment import simulated
from harness.flower.engine_app import EngineApp
from harness.matrix.results import CellResult

CELLS = [cell for cell in ENGINE_CELLS if cell.engine == "simulation"]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_a_simulated_run_comes_to_what_the_plain_loop_does(
    tmp_path: Path, cell: EngineCell, result: CellResult
) -> None:
    app = EngineApp(tmp_path, method=cell.method, codec=cell.codec, clients=cell.clients)
    finished = simulated(tmp_path / "run", app.path, app.config, nodes=cell.clients).check()
    result.note(**app.noteworthy())
    app.check_everyone_took_part(finished.log)
    app.check_outcome()
