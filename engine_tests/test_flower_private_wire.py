"""Bytes between SuperNodes and SuperLink hold shared factors, never private ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import fedpara_plugins as fedpara
from harness.flower.deployment import deployment
from harness.flower.engine_app import EngineApp
from harness.processes.canaries import Canaries

State = dict[str, Tensor]

MOST = 2000
"""Places of each tensor that are searched for."""


@pytest.mark.parametrize("split", ["on", "off"])
def test_private_bytes_on_the_wire(tmp_path: Path, split: str) -> None:
    """Uncompressed messages in plain text, all bytes of both directions.

    With the split on, the control is that the same search finds every shared factor. With the split
    off (a client that sends all it has) it finds the private ones as well, until the server, which
    takes no private names, ends the run.
    """
    component = "client_app" if split == "on" else "leaky_client_app"
    app = EngineApp(tmp_path, method="pfedpara", component=component)
    with deployment(tmp_path / "run", record=True) as engine:
        finished = engine.run(app.path, app.config)
        if split == "on":
            finished.check()
        else:
            assert "private names stay on the client" in finished.log
        streams = {way: engine.tap.streams(way) for way in ("up", "down")}
    on_wire = {way: b"\n".join(found) for way, found in streams.items()}
    private, shared = _trained(app)
    found = {way: private.found_in(data) for way, data in on_wire.items()}
    assert len(private) > (10_000 if split == "on" else 5_000)  # the run without ends early
    # Nothing cuts a payload of this size: all of each shared factor is there in one piece.
    assert shared.found_in(on_wire["up"]) == len(shared)
    if split == "on":
        assert Canaries(_part(app, app.final, "shared")).found_in(on_wire["down"]) > 0
        assert found == {"up": 0, "down": 0}
    else:
        assert found["up"] == len(private)


def _trained(app: EngineApp) -> tuple[Canaries, Canaries]:
    """Return all clients' private and shared state after each training.

    The seeded first private values are no secret: both sides compute them alike.
    """
    states = []
    for client in range(app.task.clients):
        for server_round in range(1, app.task.rounds + 1):
            state = app.noted(client, server_round, "after")
            if state is not None:
                states.append(state)
    assert states
    private, shared = (
        [value for state in states for value in _part(app, state, part)]
        for part in ("private", "shared")
    )
    seeded = fedpara.split(app.build()).private.values()
    return Canaries(private, known=seeded, most=MOST), Canaries(shared, most=MOST)


def _part(app: EngineApp, state: State, part: str) -> list[Tensor]:
    names = getattr(fedpara.split(app.build()), part)
    return [state[name] for name in names]
