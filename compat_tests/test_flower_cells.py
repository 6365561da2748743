"""The matrix: real federated runs, each checked against a plain loop in torch."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from pathlib import Path

import pytest
from torch import Tensor, nn

import fedpara_plugins as fedpara
from fedpara_plugins import Ledger, LedgerEntry
from harness.apps import Experiment, Outcome, federate, plugin_apps
from harness.cells import CODECS, GAMMA, STRATEGIES, Cell, cells, environment
from harness.reference import RULES, Reference, federated
from harness.results import CellResult
from harness.task import Task

TOLERANCE = 5e-6
"""Largest difference of a weight to the plain loop, over three rounds. Both compute in float32,
sum up in another order, and differ by some 4e-7; a wrong weight of one client in the average
differs by 1e-3 and more."""

QUANTISATION = 0.05
"""Of the way the plain loop has gone, how far off int8 may end (both as Euclidean norms). One step
is max|update|/127, so a message is off by about (peak/rms)/(127 sqrt 12) of its update, 1 % to 2 %
for the peaks of 4 to 8 rms that updates have; rounds add up like the updates themselves."""

ACCURACY = 0.02
"""8 of 400 images: a quarter of what chance would do to the accuracy of an unrelated model."""


def _params() -> list[object]:
    return [
        pytest.param(cell, id=cell.id, marks=getattr(pytest.mark, cell.strategy))
        for cell in cells(environment())
    ]


@pytest.mark.parametrize("cell", _params())
def test_cell(cell: Cell, result: CellResult, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    outcome = _run(cell, ledger)
    plain = _reference(cell.strategy, cell.method, cell.model)
    entries = Ledger.read(ledger)
    _note(result, outcome, plain, entries)
    _check_every_client_took_part(outcome)
    _check_bytes_reconcile(outcome, entries, cell)
    if cell.codec == "none":
        _check_same_weights(outcome, plain, cell)
    else:
        _check_close(outcome, plain, cell)
        _check_small(outcome, cell)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", ["none", "pfedpara"])
def test_clients_that_are_away_most_rounds(method: str, codec: str) -> None:
    """Two of four a round: each comes back to other weights than it held."""
    cell = Cell("flower", environment(), "fedavg", method, codec)
    task = Task(rounds=6)
    experiment = Experiment(task, "fedavg", {"fraction_train": 0.5, "fraction_evaluate": 0.5})
    outcome = federate(plugin_apps(experiment), _section(cell))
    asked = [sent for sent in outcome.sent if (sent.direction, sent.kind) == ("down", "train")]
    chosen = [[s.partition for s in asked if s.round == r] for r in range(1, task.rounds + 1)]
    assert all(len(clients) == 2 for clients in chosen)
    assert len({tuple(clients) for clients in chosen}) > 2
    build = partial(_build, method, cell.model)
    names = fedpara.split(build()).private
    rule = RULES["fedavg"]()
    plain = federated(task, build, rule, private_names=names, participants=chosen)
    if codec == "none":
        _check_same_weights(outcome, plain, cell)
    else:
        _check_close(outcome, plain, cell)


def _section(cell: Cell, **more: str) -> dict[str, str | float]:
    options = {"method": cell.method, "codec": cell.codec, **more}
    return {"fedpara.gamma": GAMMA, **{f"fedpara.{key}": text for key, text in options.items()}}


def _run(cell: Cell, ledger: Path) -> Outcome:
    experiment = Experiment(Task(model=cell.model), cell.strategy)
    return federate(plugin_apps(experiment), _section(cell, ledger=str(ledger)))


@cache
def _reference(strategy: str, method: str, model: str) -> Reference:
    spec, task = STRATEGIES[strategy], Task(model=model)
    build = partial(_build, method, model)
    options = {key: value for key, value in spec.options.items() if key != "proximal_mu"}
    return federated(
        task,
        build,
        RULES[spec.rule](**options),
        proximal_mu=spec.proximal_mu,
        private_names=fedpara.split(build()).private,
    )


def _build(method: str, model: str) -> nn.Module:
    net = Task(model=model).net()
    return net if method == "none" else fedpara.convert(net, method=method, gamma=GAMMA)


def _shared(cell: Cell) -> dict[str, Tensor]:
    return fedpara.split(_build(cell.method, cell.model)).shared


# What is checked ---------------------------------------------------------------------------------


def _check_every_client_took_part(outcome: Outcome) -> None:
    """A run that quietly leaves clients out would agree with nothing below, or by luck."""
    replies = [sent.message for sent in outcome.sent if sent.direction == "up"]
    assert len(replies) == 2 * 3 * 4  # train and evaluate, rounds, clients
    assert not [reply.error for reply in replies if reply.has_error()]
    assert not [line for line in outcome.log if "left out" in line]


def _check_bytes_reconcile(outcome: Outcome, entries: list[LedgerEntry], cell: Cell) -> None:
    """The ledger's bytes are the wire's, per direction, round, kind and client."""
    counted: Counter[tuple[object, ...]] = Counter()
    messages: Counter[tuple[object, ...]] = Counter()
    for sent in outcome.sent:
        if sent.arrays:
            key = (sent.direction, sent.round, sent.kind, str(sent.node))
            counted[key] += sent.array_bytes
            messages[key] += 1
    booked: Counter[tuple[object, ...]] = Counter()
    for entry in entries:
        booked[entry.direction, entry.round, entry.kind, entry.client] += entry.encoded_bytes
    assert booked == counted
    assert {key[:3] for key in counted} == {
        *(("down", r, kind) for r in (1, 2, 3) for kind in ("train", "evaluate")),
        *(("up", r, "train") for r in (1, 2, 3)),
    }
    assert len(entries) == sum(messages.values())
    dense = _bytes(Task(model=cell.model).net().state_dict())
    untouched = (cell.method, cell.codec) == ("none", "none")
    if not (untouched and cell.strategy == "fedadam"):  # whose averages are float64 under NumPy 2
        assert {entry.dense_bytes for entry in entries} == {dense}


def _check_same_weights(outcome: Outcome, plain: Reference, cell: Cell) -> None:
    assert outcome.state.keys() == plain.state.keys()
    shared = _shared(cell)
    for key, value in outcome.state.items():
        difference = float((value.double() - plain.state[key]).abs().max())
        if key in shared:
            assert difference <= TOLERANCE, key
        else:  # averaged copies of the server's own: right to the rounding of the sum
            assert difference <= 1e-6 * float(plain.state[key].abs().max()), key
    assert outcome.accuracies == pytest.approx(plain.accuracies, abs=1 / 400 + 1e-6)
    assert outcome.losses == pytest.approx(plain.losses, abs=1e-3)


def _check_close(outcome: Outcome, plain: Reference, cell: Cell) -> None:
    floats = [key for key, value in _shared(cell).items() if value.is_floating_point()]
    way = _distance(plain.state, plain.initial, floats)
    assert _distance(outcome.state, plain.state, floats) <= QUANTISATION * way
    assert outcome.accuracies[-1] >= plain.accuracies[-1] - ACCURACY
    fallen = plain.losses[0] - plain.losses[-1]
    assert fallen > 0
    assert outcome.losses == pytest.approx(plain.losses, abs=QUANTISATION * fallen)


def _check_small(outcome: Outcome, cell: Cell) -> None:
    """A float32 becomes one byte, before entropy coding, which has to pay for the headers."""
    whole, quarter = _bytes(_shared(cell)), _bytes(_shared(cell)) / 4
    for sent in outcome.sent:
        first_contact = (sent.direction, sent.round, sent.kind) == ("down", 1, "train")
        # What a client does not hold yet goes without loss, with a header of the model's plan.
        limit = 1.02 * whole + 2500 if first_contact else quarter
        assert sent.array_bytes <= limit, (sent.direction, sent.round, sent.kind)


# Figures -----------------------------------------------------------------------------------------


def _note(
    result: CellResult, outcome: Outcome, plain: Reference, entries: list[LedgerEntry]
) -> None:
    up, down = (
        [entry for entry in entries if entry.direction == direction] for direction in ("up", "down")
    )
    encoded = sum(entry.encoded_bytes for entry in entries)
    result.note(
        accuracy=outcome.accuracies[-1],
        reference_accuracy=plain.accuracies[-1],
        client_accuracy=list(outcome.client_accuracies.values())[-1],
        bytes_up=sum(entry.encoded_bytes for entry in up),
        bytes_down=sum(entry.encoded_bytes for entry in down),
        ratio_to_dense=sum(entry.dense_bytes for entry in entries) / encoded,
        max_difference=max(
            float((value.double() - plain.state[key]).abs().max())
            for key, value in outcome.state.items()
        ),
    )


def _bytes(state: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())


def _distance(a: dict[str, Tensor], b: dict[str, Tensor], keys: list[str]) -> float:
    return float(sum(((a[key].double() - b[key].double()) ** 2).sum() for key in keys) ** 0.5)
