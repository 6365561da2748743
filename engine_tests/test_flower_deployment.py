"""Runs in deployment: `flower-superlink`, `flower-supernode`s and `flwr run`, as real processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpara_plugins import LedgerEntry
from harness.cells.engines import ENGINE_CELLS, EngineCell
from harness.flower.deployment import deployment
from harness.flower.engine_app import EngineApp
from harness.matrix.results import CellResult
from harness.processes.wiretap import Wiretap

CELLS = [cell for cell in ENGINE_CELLS if cell.engine == "deployment"]

FRAMING = 3000
"""Bytes that may surround a payload on the wire without HTTP's heads: NumPy's and Flower's headers,
names, metrics, and the marker with its hashes."""


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.id)
def test_a_deployed_run_comes_to_what_the_plain_loop_does(
    tmp_path: Path, cell: EngineCell, result: CellResult
) -> None:
    app = EngineApp(tmp_path, method=cell.method, codec=cell.codec, clients=cell.clients)
    with deployment(
        tmp_path / "run",
        nodes=cell.clients,
        tls=cell.variant == "tls",
        authenticated=cell.variant == "authenticated",
        record=True,
    ) as engine:
        finished = engine.run(app.path, app.config).check()
        on_wire = b"".join(engine.tap.streams("up") + engine.tap.streams("down"))
        assert engine.processes.logs_with("Traceback") == []
    result.note(wire_bytes=len(on_wire), **app.noteworthy())
    app.check_everyone_took_part(finished.log)
    app.check_outcome()
    # In plain text names can be read; encrypted they cannot, and the plugin changes neither.
    readable = cell.variant == "insecure"
    assert (b"POST /v1/fleet/" in on_wire) == readable
    assert (b"fedpara.payload" in on_wire) == readable
    encoded = sum(entry.encoded_bytes for entry in app.ledger)
    assert encoded < finished.traffic < len(on_wire)
    if readable:
        _check_framing(app.ledger, engine.tap)
    # References and residuals outlive the process that each message has of its own.
    assert "lost what it held" not in finished.log
    if cell.codec != "none":
        whole = app.build().state_dict().values()
        size = sum(value.numel() * value.element_size() for value in whole)
        later = [entry for entry in app.ledger if (entry.direction, entry.round) != ("down", 1)]
        assert later
        assert all(entry.encoded_bytes < size / 4 for entry in later)


def _check_framing(ledger: list[LedgerEntry], tap: Wiretap) -> None:
    """Assert that little but the ledger's bytes and HTTP's heads has passed."""
    for direction, request in (("up", "push-object"), ("down", "pull-object")):
        entries = [entry for entry in ledger if entry.direction == direction]
        encoded = sum(entry.encoded_bytes for entry in entries)
        passed = tap.http(direction, "bodies")[request]
        messages = tap.http("up", "count")["confirm-message-received"]  # one each way
        assert encoded < passed < encoded + FRAMING * messages


def test_a_node_without_a_registered_key_stays_outside(tmp_path: Path) -> None:
    """Authentication is really on in the run above: the same set-up refuses a stranger."""
    with deployment(tmp_path, nodes=0, authenticated=True) as engine:
        engine.start_node(0)
        assert engine.nodes[0].wait(180) != 0
        assert "uthenti" in engine.nodes[0].text
