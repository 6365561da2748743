"""Bytes between FedML's processes hold shared factors, never private ones."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from torch import Tensor

import fedpara_plugins as fedpara
from harness.fedml.deployment import FedMLDeployment, Net
from harness.fedml.requirements import skip_without
from harness.processes.canaries import Canaries

PLUGIN = {"method": "pfedpara", "gamma": 0.3}
ROUNDS, CLIENTS = 2, 2
MOST = 2000
"""Places of each tensor that are searched for."""
CUT = 0.005
"""Share of the pieces that may be cut in two: HTTP/2, for one, sends frames of 16 kB."""


@pytest.mark.parametrize("leaks", [False, True], ids=["sound", "leaky"])
@pytest.mark.parametrize("backend", ["GRPC", "TRPC", "MQTT_S3"])
def test_private_bytes_on_the_wire(tmp_path: Path, backend: str, leaks: bool) -> None:
    """Messages without codec, in plain text: every byte of all connections, broker and store too.

    The control of the sound run is that the same search finds the shared factors; the leaky one
    sends the private factors as well, and the search finds those.
    """
    skip_without(backend)
    with FedMLDeployment(
        tmp_path, backend, plugin=PLUGIN, train={"comm_round": ROUNDS}, record=True
    ) as engine:
        engine.processes.env["FEDPARA_LEAK"] = "1" if leaks else ""
        engine.finished()
        assert engine.wire is not None
        wire = engine.wire.recorded()
    states = [
        engine.noted(client, number, "after")
        for client in range(CLIENTS)
        for number in range(1, ROUNDS + 1)
    ]
    parts = fedpara.split(fedpara.convert(Net(), **PLUGIN))
    # The first values are no secret: both sides compute them alike.
    private = Canaries(chosen(states, parts.private), known=parts.private.values(), most=MOST)
    shared = Canaries(chosen(states, parts.shared), most=MOST)
    assert len(private) > 10_000
    assert shared.found_in(wire) > (1 - CUT) * len(shared)
    found = private.found_in(wire)
    assert found > (1 - CUT) * len(private) if leaks else found == 0


def chosen(states: Iterable[dict[str, Tensor]], names: Iterable[str]) -> list[Tensor]:
    return [state[name] for state in states for name in names]
