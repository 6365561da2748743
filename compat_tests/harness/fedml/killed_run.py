"""Runs of FedML's single process that are killed (`harness.processes.killed_runs`)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import save_file

from harness.fedml.project import Sent, arguments
from harness.fedml.project import run as run_project
from harness.processes.killed_runs import Killer, RunRequest, serve

__all__ = ["FedMLRunRequest"]


@dataclass(frozen=True)
class FedMLRunRequest(RunRequest):
    """One run.

    Attributes:
        keys: keys of the YAML.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)


def run(request: FedMLRunRequest) -> None:
    """Carry out a request."""
    logging.basicConfig(filename=request.log, level=logging.INFO, force=True)
    killer = Killer(request)

    def tap(sent: Sent) -> bytes:
        killer.passes(trains_in=sent.round if sent.direction == "down" else 0)
        return sent.data

    save_file(run_project(tap=tap, **request.keys).state, request.output)


if __name__ == "__main__":
    arguments()  # once, before any fork
    serve(FedMLRunRequest, run)
