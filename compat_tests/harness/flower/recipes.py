"""The apps in ``examples/``, as they stand there and with the plugin's diff applied."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomllib
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg, Result

from harness.flower.apps import Apps, Outcome

__all__ = ["recipe"]

EXAMPLES = Path(__file__).parents[3] / "examples"


@contextmanager
def recipe(
    name: str, folder: Path, *, plugin: bool = True, clients: int = 2
) -> Iterator[tuple[Apps, dict[str, Any]]]:
    """Import an app of the examples; yield both its sides, and its config as Flower flattens it.

    Args:
        name: its folder's name.
        folder: an empty one, for the copy that is imported.
        plugin: whether its diff is applied.
        clients: how many there are.
    """
    copy = folder / "examples" / name
    copied = ("pyproject.toml", *(p.relative_to(EXAMPLES / name) for p in _sources(name)))
    for each in copied:
        (copy / each).parent.mkdir(parents=True, exist_ok=True)
        (copy / each).write_bytes((EXAMPLES / name / each).read_bytes())
    if plugin:
        # `git apply` outside of a repository takes paths as they are.
        command = ["git", "apply", str(EXAMPLES / f"{name}.diff")]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    flower = tomllib.loads((copy / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    places = [flower["components"][side].split(":")[0] for side in ("clientapp", "serverapp")]
    sys.path.insert(0, str(copy))
    try:
        client, server = (importlib.import_module(place) for place in places)
        yield (
            Apps(lambda: client.app, lambda outcome: _watched(server.app, outcome), clients),
            dict(_flat(flower["config"])),
        )
    finally:
        sys.path.remove(str(copy))
        package = places[0].split(".")[0]
        for loaded in [m for m in sys.modules if m.split(".")[0] == package]:
            del sys.modules[loaded]


def _sources(name: str) -> list[Path]:
    return sorted((EXAMPLES / name).glob("*/*.py"))


def _watched(app: ServerApp, outcome: Outcome) -> Any:
    """Keep what the app's strategy returns."""

    def run(*args: Any, **kwargs: Any) -> None:
        start = FedAvg.start

        def kept(self: FedAvg, *own: Any, **named: Any) -> Result:
            result = start(self, *own, **named)
            outcome.state = dict(result.arrays.to_torch_state_dict())
            scores = result.evaluate_metrics_serverapp
            outcome.accuracies = [float(scores[number]["accuracy"]) for number in sorted(scores)]
            return result

        FedAvg.start = kept
        try:
            app(*args, **kwargs)
        finally:
            FedAvg.start = start

    return run


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
