"""Strategies with a ``start`` of their own, loops without one, and fleets where clients differ."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Result

import fedpara_plugins_flower as fedpara
from harness.flower.apps import Apps, Outcome, federate
from harness.flower.part_apps import PARTS, part_apps

HEAD = PARTS["head"]


class OwnStart(FedAvg):
    """A strategy that writes the loop of ``start`` anew, as several of Flower's examples do."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: Any = None,
        evaluate_config: Any = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Train for some rounds, and evaluate on the server."""
        result, arrays = Result(), initial_arrays
        from flwr.app import ConfigRecord

        for number in range(1, num_rounds + 1):
            messages = self.configure_train(number, arrays, ConfigRecord(), grid)
            replies = grid.send_and_receive(messages, timeout=timeout)
            found, _ = self.aggregate_train(number, replies)
            arrays = arrays if found is None else found
            if evaluate_fn is not None:
                evaluate_fn(number, arrays)
        result.arrays = arrays
        return result


class OtherArguments(FedAvg):
    """A strategy whose ``start`` has other arguments."""

    def start(self, grid: Grid, model: ArrayRecord, rounds: int) -> Result:  # type: ignore[override]
        """Train for some rounds."""
        return super().start(grid=grid, initial_arrays=model, num_rounds=rounds)


def apps_of(main: Callable[[Grid, ArrayRecord], None]) -> Apps:
    inner = part_apps(HEAD)
    build = fedpara.factorised(lambda: HEAD.factory())

    def server(outcome: Outcome) -> ServerApp:
        app = fedpara.server_app(ServerApp())

        @app.main()
        def run(grid: Grid, context: Context) -> None:
            main(grid, ArrayRecord(HEAD.records(build())["arrays"]))

        return app

    return Apps(inner.client, server, inner.clients)


def section(folder: Path) -> dict[str, Any]:
    options = {"method": "fedpara", "gamma": 0.3, "min_size": 256, "codec": "small"}
    options |= {"state-dir": str(folder / "state"), "ledger": str(folder / "ledger.jsonl")}
    return {f"fedpara.{key}": value for key, value in options.items()}


def evaluated(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "ledger.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if entry.get("source") == "server"]


def test_a_start_of_its_own_keeps_rounds_and_the_servers_metrics(tmp_path: Path) -> None:
    seen: list[int] = []

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(number)
        return MetricRecord({"accuracy": 0.5})

    def main(rounds: int) -> Callable[[Grid, ArrayRecord], None]:
        strategy = OwnStart(fraction_evaluate=0.0)
        return lambda grid, first: print(
            strategy.start(grid, first, num_rounds=rounds, evaluate_fn=evaluate)
        )

    federate(apps_of(main(2)), section(tmp_path))
    assert seen == [1, 2]
    assert len(evaluated(tmp_path)) == 2
    assert list((tmp_path / "state" / "server").glob("rounds-0.safetensors"))
    seen.clear()
    outcome = federate(apps_of(main(3)), section(tmp_path))
    assert seen == [3]  # it goes on after the second round
    assert any("holds round 2" in line for line in outcome.log)


def test_a_start_with_other_arguments_is_hooked_where_it_calls_the_inherited_one(
    tmp_path: Path,
) -> None:
    strategy = OtherArguments(fraction_evaluate=0.0)
    apps = apps_of(lambda grid, first: print(strategy.start(grid, first, 1)))
    outcome = federate(apps, section(tmp_path))
    assert list((tmp_path / "state" / "server").glob("rounds-0.safetensors"))
    assert not any("rounds of its own" in line for line in outcome.log)


def test_a_loop_of_the_apps_own_is_named_once(tmp_path: Path) -> None:
    outcome = federate(part_apps(PARTS["two_parts"]), section(tmp_path))
    assert len([line for line in outcome.log if "rounds of its own" in line]) == 1


def test_a_client_without_the_mod_gets_the_line_to_add_and_ends_nothing() -> None:
    with_mod, without = part_apps(HEAD), part_apps(HEAD, client_plugin=False)

    def client() -> Any:
        def app(message: Message, context: Context) -> Message:
            lacks = context.node_config["partition-id"] == 1
            found: ClientApp = (without if lacks else with_mod).client()
            reply: Message = found(message, context)
            return reply

        return app

    options = {"fedpara.method": "none", "fedpara.codec": "lossless"}
    apps = Apps(client, with_mod.server, 3)
    outcome = federate(apps, options)
    assert outcome.state
    hints = [line for line in outcome.log if "Add to that client" in line]
    assert 1 <= len(hints) <= 2  # one a round
    assert all("fedpara.client_mod" in line for line in hints)
    raw = [line for line in outcome.log if "Missing key" in line or "Unexpected key" in line]
    assert not raw
    assert torch.isfinite(outcome.state["head.weight"]).all()
