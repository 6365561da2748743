"""Clients that are away, late or without their state: the cost of their downlink."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ArrayRecord, Message
from flwr.serverapp import strategy

from fedpara_plugins.codecs import reference_hash
from fedpara_plugins.codecs.payload import decode_payload
from fedpara_plugins_flower.server.outbox import Outbox
from harness.cells.flower import GAMMA
from harness.flower.apps import Experiment, Outcome, federate, plugin_apps
from harness.flower.inprocess_grid import InProcessGrid, Sent
from harness.oracles.cell_model import slow_options
from harness.oracles.descriptions import peek_header
from harness.oracles.task import TrainingTask

SCHEMES = ("client", "grid")
CODECS = ("small", "balanced", "int8")


def _section(codec: str, scheme: str = "client", **more: Any) -> dict[str, Any]:
    options = {"method": "fedpara", "gamma": GAMMA, "codec": codec, "references": scheme}
    chosen = {**options, "init": "seeded", **more}
    return {f"fedpara.{key.replace('_', '-')}": value for key, value in chosen.items()}


def _payload(sent: Sent) -> bytes:
    (record,) = sent.arrays.values()
    (array,) = record.values()
    return array.numpy().tobytes()


def _trained_on(sent: list[Sent]) -> dict[tuple[int, int], int]:
    """Count the bytes of each training message to a client, by round and client."""
    return {
        (s.round, s.partition): s.array_bytes
        for s in sent
        if (s.direction, s.kind) == ("down", "train")
    }


@pytest.fixture
def held_alike(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Assert that the server holds every hash a client names, with the very same bits."""
    checked: list[str] = []
    note: Callable[..., None] = Outbox.note_reply

    def noting(self: Outbox, node: int, marker: Any) -> None:
        for name, reference in marker.holds.items():
            # Hashed anew here: what lies under the name is what the name says.
            assert reference_hash(self.references[reference]) == reference, name
            checked.append(reference)
        note(self, node, marker)

    monkeypatch.setattr(Outbox, "note_reply", noting)
    return checked


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_pattern_of_absences(scheme: str, codec: str, held_alike: list[str]) -> None:
    """A client a round, by chance; now and then one loses all. It learns as if all were well."""
    lost: list[tuple[int, int]] = []
    draw = random.Random(1)

    def tap(sent: Sent, grid: InProcessGrid) -> None:
        if (sent.direction, sent.kind) == ("down", "train") and draw.random() < 0.25:
            grid.lose_state(sent.partition)
            lost.append((sent.round, sent.partition))

    task = TrainingTask(rounds=12, epochs=1)
    options = {"fraction_train": 0.5, "fraction_evaluate": 0.25, "min_evaluate_nodes": 1}
    run = federate(
        plugin_apps(Experiment(task, "fedavg", options)), _section(codec, scheme), tap=tap
    )
    exact = federate(plugin_apps(Experiment(task, "fedavg", options)), _section("none", scheme))
    assert len(held_alike) >= 2 * task.rounds
    assert len(lost) >= 3
    answered = {
        (s.round, s.partition) for s in run.sent if (s.direction, s.kind) == ("up", "train")
    }
    # Whoever was asked has answered with weights, in that round.
    assert set(_trained_on(run.sent)) == answered
    last = {(s.round, s.partition): s for s in run.sent if (s.direction, s.kind) == ("up", "train")}
    assert all(sent.arrays for sent in last.values())
    assert run.losses[-1] < run.losses[0]
    assert run.accuracies[-1] > exact.accuracies[-1] - 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_client_that_was_away_for_ten_rounds_costs_little_more(scheme: str) -> None:
    away = {"small": (1.3, 3.0), "balanced": (1.3, 3.0)}

    class Absent(strategy.FedAvg):
        """The first client takes part in rounds 1, 2 and 12 only."""

        def configure_train(self, server_round: int, *args: Any, **kwargs: Any) -> list[Message]:
            messages = list(super().configure_train(server_round, *args, **kwargs))
            first = min(message.metadata.dst_node_id for message in messages)
            here = server_round in (1, 2, 12)
            return [m for m in messages if here or m.metadata.dst_node_id != first]

    for codec, bounds in away.items():
        section = _section(codec, scheme, **slow_options("fedpara"))
        outcome = _federate_with(Absent, TrainingTask(rounds=12, epochs=1), section)
        sizes = _trained_on(outcome.sent)
        (absent,) = {p for r, p in sizes if r == 1} - {p for r, p in sizes if r == 5}
        others = [size for (r, p), size in sizes.items() if r == 12 and p != absent]
        raw = sum(value.nbytes for value in outcome.state.values())
        assert max(others) < raw / (2.5 if codec == "balanced" else 6)  # updates, not models
        ratio = sizes[12, absent] / (sum(others) / len(others))
        assert ratio <= bounds[scheme == "grid"], (codec, ratio)


def _federate_with(
    kind: type[strategy.FedAvg], task: TrainingTask, section: dict[str, Any]
) -> Outcome:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strategy, "FedAvg", kind)
        options = {"fraction_evaluate": 0.0}
        return federate(plugin_apps(Experiment(task, "fedavg", options)), section)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_seeded_start_costs_next_to_nothing(scheme: str) -> None:
    """Only what is dense (biases, norms, small layers) has to be sent."""
    task = TrainingTask(rounds=1, epochs=1)
    seeded = federate(plugin_apps(Experiment(task)), _section("small", scheme))
    drawn = federate(plugin_apps(Experiment(task)), _section("small", scheme, init="random"))
    sizes = [_trained_on(run.sent)[1, 0] for run in (seeded, drawn)]
    raw = sum(v.nbytes for v in seeded.state.values())
    dense = sum(
        v.nbytes for k, v in seeded.state.items() if not k.endswith((".x1", ".y1", ".x2", ".y2"))
    )
    assert sizes[0] < dense < raw
    assert sizes[0] < 0.5 * sizes[1]
    assert any("4 clients that are new" in line for line in seeded.log)


def test_a_late_joiner_and_one_that_lost_all_get_a_coded_model_once() -> None:
    def tap(sent: Sent, grid: InProcessGrid) -> None:
        if (sent.direction, sent.kind, sent.round) == ("down", "train", 3):
            grid.lose_state(2)

    task = TrainingTask(rounds=4, epochs=1)
    outcome = federate(plugin_apps(Experiment(task)), _section("balanced"), tap=tap)
    to_it = [s for s in outcome.sent if s.partition == 2 and s.direction == "down"]
    based = [s for s in to_it if "base" in (peek_header(_payload(s)).extra or {})]
    assert [(s.round, s.kind) for s in based] == [(1, "train"), (3, "train")]
    # Self-contained: whoever has the bytes has the model, in fine steps.
    header = peek_header(_payload(based[1]))
    assert header.extra is not None
    assert header.extra["base"]["kind"] == "zeros"
    raw = sum(v.nbytes for v in outcome.state.values())
    assert len(_payload(based[1])) < raw / 2
    assert [line for line in outcome.log if "1 clients that lost it" in line]


def test_one_encoding_serves_all_that_hold_the_same() -> None:
    outcome = federate(plugin_apps(Experiment(TrainingTask(rounds=3, epochs=1))), _section("small"))
    for server_round in (1, 2, 3):
        for kind in ("train", "evaluate"):
            payloads = {
                _payload(s)
                for s in outcome.sent
                if (s.round, s.kind, s.direction) == (server_round, kind, "down")
            }
            assert len(payloads) == 1, (server_round, kind)


def test_references_beyond_the_memory_lie_on_disk(tmp_path: Any) -> None:
    """No memory at all: the run is the same, bit by bit."""
    task = TrainingTask(rounds=3, epochs=1)
    one = federate(plugin_apps(Experiment(task)), _section("small"))
    section = {
        **_section("small"),
        "fedpara.reference-memory": 0,
        "fedpara.state-dir": str(tmp_path),
    }
    other = federate(plugin_apps(Experiment(task)), section)
    assert ArrayRecord(one.state).object_id == ArrayRecord(other.state).object_id
    files = list((tmp_path / "server" / "references" / "states").iterdir())
    assert files
    for path in files:
        data = path.read_bytes()
        assert reference_hash(decode_payload(data, limit=len(data)).tensors) == path.stem


@pytest.mark.parametrize(("name", "value"), [("references", "all"), ("reference-memory", "much")])
def test_bad_options_are_refused(name: str, value: str) -> None:
    section = {**_section("small"), f"fedpara.{name}": value}
    outcome = federate(plugin_apps(Experiment(TrainingTask(rounds=1))), section, raises=False)
    assert name.replace("-", "_") in str(outcome.error)
    assert not outcome.sent
