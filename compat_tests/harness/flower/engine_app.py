"""The app that runs on real engines, in fresh folders, and the expected result of its run."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fedpara_plugins as fedpara
from fedpara_plugins import Ledger, LedgerEntry
from harness.cells.flower import GAMMA
from harness.flower.deployment import app_copy
from harness.oracles.plain_loop import RULES, PlainResult, run_plain_loop
from harness.oracles.task import TrainingTask
from harness.processes.kept_private import KeptPrivate, Traffic

__all__ = ["EngineApp"]

APP = Path(__file__).resolve().parents[3] / "engine_tests" / "engine_app"

TOLERANCE = 5e-6
"""As in the cells without engine: rounding gives 4e-7, a wrong weight in the average 1e-3."""

QUANTISATION = 0.05
"""Of the way the plain loop has gone, how far off a lossy codec may end; as in the other cells."""

State = dict[str, Tensor]


class EngineApp:
    """One run of the app in `engine_tests`.

    Args:
        folder: a fresh one.
        method: the plugin's method.
        codec: the plugin's codec.
        clients: how many there are.
        rounds: number of rounds.
        component: module of the ClientApp.
        server_component: module of the ServerApp.
        options: more of the app's config.

    Attributes:
        path: the app's folder, for ``flwr run``.
        config: the config for ``flwr run --run-config``.
        task: the training problem.
    """

    def __init__(
        self,
        folder: Path,
        *,
        method: str,
        codec: str = "none",
        clients: int = 2,
        rounds: int = 2,
        component: str = "client_app",
        server_component: str = "server_app",
        options: Mapping[str, bool | float | int | str] | None = None,
    ) -> None:
        self.path = app_copy(APP, folder)
        self._results, self._diary = folder / "results", folder / "diary"
        self._ledger = self._results / "ledger.jsonl"
        for needed in (self._results, self._diary):
            needed.mkdir()
        declared = self.path / "pyproject.toml"
        text = declared.read_text("utf-8")
        for part, chosen in (("client_app", component), ("server_app", server_component)):
            text = text.replace(f"engine_app.{part}:", f"engine_app.{chosen}:")
        declared.write_text(text, "utf-8")
        self.method, self.codec = method, codec
        self.task = TrainingTask(clients=clients, rounds=rounds, epochs=1)
        self.config = {
            "rounds": rounds,
            "clients": clients,
            "results": str(self._results),
            "diary": str(self._diary),
            "fedpara.method": method,
            "fedpara.gamma": GAMMA,
            "fedpara.clip": "none",  # as the plain loop
            "fedpara.codec": codec,
            "fedpara.ledger": str(self._ledger),
            **(options or {}),
        }

    def build(self) -> nn.Module:
        """Build the model as both sides do."""
        net = self.task.net()
        if self.method == "none":
            return net
        return fedpara.convert(net, method=self.method, gamma=GAMMA)

    # What the run left behind

    @property
    def final(self) -> State:
        """Load the server's state at the end."""
        state: State = torch.load(self._results / "final.pt", weights_only=True)
        return state

    @property
    def figures(self) -> dict[str, list[float]]:
        """Load ``losses`` of the server's model, from before round 1, and ``client_accuracies``."""
        figures: dict[str, Any] = json.loads((self._results / "figures.json").read_text("utf-8"))
        return figures

    @property
    def ledger(self) -> list[LedgerEntry]:
        """Read the bytes that the plugin counted."""
        return Ledger.read(self._ledger)

    def noted(self, client: int, server_round: int, when: str) -> State | None:
        """Load a client's state ``before`` or ``after`` training; None if it took no part."""
        path = self._diary / f"{client}-{server_round}-{when}.pt"
        if not path.exists():
            return None
        state: State = torch.load(path, weights_only=True)
        return state

    # What it must have come to

    def reference(self) -> PlainResult:
        """Run the plain loop in torch for the same task."""
        names = fedpara.split(self.build()).private
        return run_plain_loop(self.task, self.build, RULES["fedavg"](), private_names=names)

    def check_everyone_took_part(self, log: str) -> None:
        """Assert that no reply is missing: a run without some clients could match by luck."""
        answers = re.findall(r"Received (\d+) results and (\d+) failures", log)
        assert answers == [(str(self.task.clients), "0")] * (2 * self.task.rounds)
        assert "left out" not in log

    def noteworthy(self) -> dict[str, float]:
        """Return figures for the page of cells."""
        entries = self.ledger
        encoded = sum(entry.encoded_bytes for entry in entries)
        return {
            "loss": self.figures["losses"][-1],
            "reference_loss": self.reference().losses[-1],
            "ratio_to_dense": sum(entry.dense_bytes for entry in entries) / encoded,
        }

    def check_nothing_private_left(self, *, control: bool = True) -> None:
        """Assert that nothing that left a client holds what it keeps private.

        Args:
            control: whether what it shares must be found by the same search.
        """
        names = set(fedpara.split(self.build()).private)
        found = KeptPrivate.of(self._states(), names, seeded=self.build().state_dict())
        traffic = self.traffic
        assert any(each.direction == "up" for each in traffic)
        found.check(traffic)
        if control and names:
            found.check_control(traffic, raw=self.codec == "none")

    @property
    def traffic(self) -> list[Traffic]:
        """What came to clients and left them, outside of all mods."""
        found = []
        for path in sorted(self._diary.iterdir()):
            _, _, rest = path.name.partition(".")
            direction, _, kind = rest.partition(".")
            data = path.read_bytes()
            if kind == "bytes":
                found.append(Traffic(direction, data, {}))
            elif kind == "payload":
                found.append(Traffic(direction, b"", {"": data}))
        return found

    def _states(self) -> list[State]:
        clients, rounds = range(self.task.clients), range(1, self.task.rounds + 1)
        found = (self.noted(client, number, "after") for client in clients for number in rounds)
        return [state for state in found if state is not None]

    def check_outcome(self) -> None:
        """Assert that the run equals the plain loop, or is near to it with a lossy codec.

        And that nothing private left a client.
        """
        self.check_nothing_private_left()
        if self.codec == "none":
            self.check_equal()
        else:
            self.check_close()

    def check_equal(self) -> None:
        """Assert that the server's state equals the plain loop's to float tolerance."""
        plain, final = self.reference(), self.final
        assert final.keys() == plain.state.keys()
        shared = fedpara.split(self.build()).shared
        for key, value in final.items():
            if key in shared:
                assert float((value.double() - plain.state[key]).abs().max()) <= TOLERANCE, key
            else:  # the server's own: private factors are zero there
                assert not value.any(), key
        torch.testing.assert_close(
            torch.tensor(self.figures["losses"]), torch.tensor(plain.losses), rtol=0, atol=1e-3
        )

    def check_close(self, within: float = QUANTISATION) -> None:
        """Assert that the server's shared state is near the plain loop's, relative to its way."""
        plain, final = self.reference(), self.final
        shared = fedpara.split(self.build()).shared
        off = _distance(final, plain.state, shared)
        assert off <= within * _distance(plain.state, plain.initial, shared)


def _distance(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Mapping[str, Any]
) -> float:
    return float(sum(((one[k].double() - other[k].double()) ** 2).sum() for k in names)) ** 0.5
