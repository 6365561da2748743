"""What a run's ledger holds besides bytes: settings, layers, and how good the model was."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError, LedgerEntry
from fedpara_plugins.ledger import Evaluation, LayerSize, RunStart, read_lines
from harness.cells.flower import GAMMA
from harness.flower.apps import Apps, Experiment, Outcome, federate, plugin_apps
from harness.oracles.cell_model import slow_options
from harness.oracles.task import TrainingTask

ON_AND_OFF = [("none", "none"), ("pfedpara", "int8")]


def _section(
    ledger: Path | str, method: str = "fedpara", codec: str = "none", **more: Any
) -> dict[str, Any]:
    options = {"method": method, "codec": codec, "ledger": str(ledger), "gamma": GAMMA, **more}
    return {f"fedpara.{key.replace('_', '-')}": value for key, value in options.items()}


def _figures(path: Path, source: str, metric: str) -> dict[int, float | None]:
    return {
        line.round: line.value
        for line in read_lines(path)
        if isinstance(line, Evaluation) and (line.source, line.metric) == (source, metric)
    }


@pytest.mark.in_turn
@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize(("method", "codec"), ON_AND_OFF)
def test_figures_of_merit_are_written_without_an_edit(
    tmp_path: Path, method: str, codec: str, suffix: str
) -> None:
    """The server's, from the strategy's evaluate_fn, and the clients' mean, as Flower gives it."""
    ledger = tmp_path / f"ledger.{suffix}"
    outcome = federate(plugin_apps(Experiment()), _section(ledger, method, codec))
    assert _figures(ledger, "server", "accuracy") == dict(enumerate(outcome.accuracies))
    assert _figures(ledger, "server", "loss") == dict(enumerate(outcome.losses))
    assert len(outcome.accuracies) == 4
    assert _figures(ledger, "clients", "eval_acc") == pytest.approx(outcome.client_accuracies)
    assert set(outcome.client_accuracies) == {1, 2, 3}
    names = {line.metric for line in read_lines(ledger) if isinstance(line, Evaluation)}
    assert names == {"accuracy", "loss", "eval_acc", "eval_loss"}  # the weights are no figure
    starts = [line for line in read_lines(ledger) if isinstance(line, RunStart)]
    assert starts == [RunStart(version=fedpara.__version__, method=method, codec=codec)]


def test_every_line_is_on_disk_when_a_round_ends(tmp_path: Path) -> None:
    """A run that is killed in round 3 has left rounds 1 and 2 whole."""
    ledger = tmp_path / "ledger.jsonl"
    seen: list[list[Any]] = []

    def tap(sent: Any, grid: Any) -> None:
        if (sent.direction, sent.kind, sent.round) == ("down", "train", 3) and not seen:
            seen.append(list(read_lines(ledger)))

    federate(plugin_apps(Experiment()), _section(ledger), tap=tap)
    rounds = Counter(line.round for line in seen[0] if isinstance(line, LedgerEntry))
    assert rounds[1] == rounds[2] == 12  # train down and up, evaluate down; four clients
    figures = {(f.round, f.source) for f in seen[0] if isinstance(f, Evaluation)}
    assert figures == {(0, "server"), *((r, who) for r in (1, 2) for who in ("server", "clients"))}


def test_layers_add_up_to_one_message(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    federate(plugin_apps(Experiment(TrainingTask(rounds=1))), _section(ledger, "pfedpara", "int8"))
    lines = list(read_lines(ledger))
    layers = [line for line in lines if isinstance(line, LayerSize)]
    first = next(line for line in lines if isinstance(line, LedgerEntry))
    assert [layer.layer for layer in layers] == ["conv1", "norm1", "conv2", "norm2", "fc1", "fc2"]
    assert sum(layer.raw_bytes for layer in layers) == first.raw_bytes
    assert sum(layer.tensors for layer in layers) == first.tensors
    dense = {
        name: _bytes(layer.state_dict()) for name, layer in TrainingTask().net().named_children()
    }
    assert {layer.layer: layer.dense_bytes for layer in layers} == dense
    fc1 = next(layer for layer in layers if layer.layer == "fc1")
    assert fc1.raw_bytes < fc1.dense_bytes / 2


@pytest.mark.parametrize(("method", "codec"), ON_AND_OFF)
def test_the_papers_formula(tmp_path: Path, method: str, codec: str) -> None:
    """2 x participants x size x rounds, the size counted by hand from shapes and rank."""
    ledger = tmp_path / "ledger.jsonl"
    task = TrainingTask(rounds=3)
    section = _section(ledger, method, codec, **slow_options(method))
    federate(plugin_apps(Experiment(task)), section)
    train = [e for e in read_lines(ledger) if isinstance(e, LedgerEntry) and e.kind == "train"]
    model = fedpara.convert(task.net(), method=method, gamma=GAMMA) if method != "none" else None
    size = 0
    for name, value in task.net().state_dict().items():
        layer = dict(model.named_modules())[name.rpartition(".")[0]] if model else None
        rank = layer.plans["weight"].rank if hasattr(layer, "plans") else 0  # type: ignore[union-attr]
        if not rank or not name.endswith("weight"):
            size += 4 * value.numel()
        elif value.dim() == 2:  # pFedPara shares X1, Y1 of a matrix
            size += 4 * rank * (value.shape[0] + value.shape[1])
        else:  # and the core T1 (R, R, k, k) of a kernel besides
            size += 4 * rank * (value.shape[0] + value.shape[1] + rank * value[0, 0].numel())
    assert sum(entry.raw_bytes for entry in train) == 2 * 4 * size * 3
    dense = _bytes(task.net().state_dict())
    assert sum(entry.dense_bytes for entry in train) == 2 * 4 * dense * 3


def test_a_loop_of_ones_own_logs_its_figures(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    plain = plugin_apps(Experiment())

    def server(outcome: Outcome) -> ServerApp:
        import fedpara_plugins_flower as plugin

        app = plugin.server_app(ServerApp())

        @app.main()
        def main(grid: Any, context: Any) -> None:
            plugin.log_metrics(0, accuracy=0.1, round=3, source=5)
            plugin.log_metrics(1, accuracy=float("nan"))

        return app

    federate(Apps(plain.client, server), _section(ledger))
    assert _figures(ledger, "server", "accuracy") == {0: 0.1, 1: None}
    assert _figures(ledger, "server", "round") == {0: 3.0}
    assert _figures(ledger, "server", "source") == {0: 5.0}
    import fedpara_plugins_flower as plugin

    with pytest.raises(ConfigError, match="inside the main function"):
        plugin.log_metrics(1, accuracy=0.5)


@pytest.mark.parametrize(("method", "codec"), ON_AND_OFF)
def test_replies_that_are_pulled_one_by_one(tmp_path: Path, method: str, codec: str) -> None:
    """A loop with push_messages and pull_messages: the mean comes when the round is over."""
    ledger = tmp_path / "ledger.jsonl"
    plain = plugin_apps(Experiment())
    answers: list[float] = []

    def server(outcome: Outcome) -> ServerApp:
        import fedpara_plugins_flower as plugin

        app, net = plugin.server_app(ServerApp()), plugin.factorised(TrainingTask().net)

        @app.main()
        def main(grid: Any, context: Any) -> None:
            arrays = ArrayRecord(net().state_dict())
            content = RecordDict({"arrays": arrays, "config": ConfigRecord({"server-round": 1})})
            for node in grid.get_node_ids():
                message = Message(content, dst_node_id=node, message_type="evaluate")
                for reply in grid.pull_messages(list(grid.push_messages([message]))):
                    answers.append(reply.content["metrics"]["eval_acc"])

        return app

    federate(Apps(plain.client, server), _section(ledger, method, codec))
    assert len(answers) == 4  # of clients with equally many images
    assert _figures(ledger, "clients", "eval_acc") == {1: pytest.approx(sum(answers) / 4)}


def test_strategies_outside_a_run_are_left_alone(tmp_path: Path) -> None:
    """After a run with a ledger, an app of the same process without the plugin is what it was."""
    ledger = tmp_path / "ledger.jsonl"
    federate(plugin_apps(Experiment(TrainingTask(rounds=1))), _section(ledger))
    before = ledger.read_bytes()
    seen: list[int] = []

    def evaluate_fn(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(server_round)
        return MetricRecord({"accuracy": 0.5})

    class NoGrid:
        def get_node_ids(self) -> list[int]:
            return []

        def send_and_receive(self, messages: Any, timeout: float) -> list[Any]:
            return list(messages)

    arrays = ArrayRecord({"w": _array()})
    strategy = FedAvg(fraction_train=0.0, fraction_evaluate=0.0)
    result = strategy.start(NoGrid(), arrays, num_rounds=1, evaluate_fn=evaluate_fn)  # type: ignore[arg-type]
    assert seen == [0, 1]
    assert result.evaluate_metrics_serverapp[0]["accuracy"] == 0.5
    assert ledger.read_bytes() == before


@pytest.mark.parametrize("weight", [None, 0])
def test_the_clients_mean_is_plain_where_a_client_gives_no_weight(weight: int | None) -> None:
    from fedpara_plugins_flower.server.evaluation import ClientMetrics, scalars

    metrics = ClientMetrics()
    metrics.add({"acc": 0.5, "num-examples": 100.0})
    metrics.add({"acc": 1.0, "loss": 3.0} | ({} if weight is None else {"num-examples": 0.0}))
    assert metrics.taken() == {"acc": 0.75, "loss": 3.0}
    assert metrics.taken() == {}
    assert scalars([{"a": 1, "b": [1.0, 2.0]}, {"c": 2.5}]) == {"a": 1.0, "c": 2.5}


@pytest.mark.parametrize("weight", ["num-examples", "num_examples"])
def test_the_clients_mean_is_weighted_by_examples(weight: str) -> None:
    from fedpara_plugins_flower.server.evaluation import ClientMetrics

    metrics = ClientMetrics()
    metrics.add({"acc": 0.5, weight: 100.0})
    metrics.add({"acc": 1.0, "loss": 3.0, weight: 300.0})
    assert metrics.taken() == {"acc": 0.875, "loss": 3.0}


def test_the_log_has_one_line_a_round(tmp_path: Path) -> None:
    outcome = federate(plugin_apps(Experiment()), _section(tmp_path / "l.jsonl", codec="int8"))
    lines = [line for line in outcome.log if line.startswith("fedpara: round")]
    number = r"\d[\d.]* [kM]?B"
    fewer = rf"{number} of {number} dense \(\d+\.\dx fewer\)"
    assert len(lines) == 3
    for count, line in enumerate(lines, start=1):
        pattern = rf"fedpara: round {count}: up {fewer}, down {fewer}, 4 clients"
        assert re.fullmatch(pattern, line), line


def _array() -> Any:
    from flwr.app import Array

    return Array(torch.ones(2).numpy())


def _bytes(state: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())
