"""Assertions about a cell's run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from torch import Tensor

from fedpara_plugins import LedgerEntry
from harness.cells.base import Cell
from harness.cells.refusals import Refusal
from harness.cells.strategies import STRATEGIES
from harness.flower.apps import Outcome
from harness.matrix.cell_runs import COUNTERS, private_names, shared, task_of
from harness.oracles.plain_loop import PlainResult
from harness.oracles.task import HELD_OUT, TEST

__all__ = [
    "check_bytes_reconcile",
    "check_cell",
    "check_close",
    "check_every_client_took_part",
    "check_learned",
    "check_private",
    "check_refused",
    "check_same_weights",
    "check_sizes",
    "distance",
]

TOLERANCE = 5e-6
"""Largest difference of a weight to the plain loop, over three rounds. Both compute in float32,
sum up in another order, and differ by some 4e-7; a wrong weight of one client in the average
differs by 1e-3 and more."""

QUANTISATION = 0.05
"""Of the way the plain loop has gone, how far off a lossy codec may end (both as Euclidean norms).
One step of int8 is max|update|/127, so a message is off by about (peak/rms)/(127 sqrt 12) of its
update, 1 % to 2 % for the peaks of 4 to 8 rms that updates have, and ``balanced`` by 1.4 %; rounds
add up like the updates themselves."""

ACCURACY = 0.02
"""8 of 400 images: a quarter of what chance would do to the accuracy of an unrelated model."""


def check_cell(
    cell: Cell, outcome: Outcome, plain: PlainResult, entries: Sequence[LedgerEntry]
) -> None:
    """Apply all checks below to a cell that trains."""
    check_every_client_took_part(outcome, cell)
    check_bytes_reconcile(outcome, entries, cell)
    check_sizes(outcome, entries, cell)
    check_private(outcome, cell)
    if cell.exact:
        check_same_weights(outcome, plain, cell)
    else:
        check_close(outcome, plain, cell)
    check_learned(outcome, plain, cell)


def check_every_client_took_part(outcome: Outcome, cell: Cell) -> None:
    """Assert that no client was left out: such a run could match the plain loop by luck."""
    task = task_of(cell)
    replies = [sent.message for sent in outcome.sent if sent.direction == "up"]
    assert len(replies) == 2 * task.rounds * task.clients  # train and evaluate
    assert not [reply.error for reply in replies if reply.has_error()]
    assert not [line for line in outcome.log if "left out" in line]


def check_bytes_reconcile(outcome: Outcome, entries: Sequence[LedgerEntry], cell: Cell) -> None:
    """Assert that the ledger's bytes are the wire's, by direction, round, kind and client."""
    rounds = range(1, task_of(cell).rounds + 1)
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
        *(("down", r, kind) for r in rounds for kind in ("train", "evaluate")),
        *(("up", r, "train") for r in rounds),
    }
    assert len(entries) == sum(messages.values())
    _check_dense_bytes(entries, cell)


def _check_dense_bytes(entries: Sequence[LedgerEntry], cell: Cell) -> None:
    state = task_of(cell).net().state_dict()
    hidden = private_names(cell)
    dense = _bytes({k: v for k, v in state.items() if not (k.endswith(COUNTERS) and k in hidden)})
    if cell.plain and STRATEGIES[cell.strategy].doubles and np.__version__ >= "2":
        # What the plugin does not touch goes out again as the strategy made it: in float64.
        first = [e for e in entries if (e.direction, e.round, e.kind) == ("down", 1, "train")]
        later = [e for e in entries if e.direction == "down" and e not in first]
        assert {entry.dense_bytes for entry in first} == {dense}
        numbers = sum(value.numel() for value in state.values())
        assert {entry.dense_bytes for entry in later} == {8 * numbers}
    else:
        assert {entry.dense_bytes for entry in entries} == {dense}


def check_private(outcome: Outcome, cell: Cell) -> None:
    """Assert that clients kept what the cell keeps private.

    `federate` has searched what left them for it; the control is that the same search finds what
    they shared.
    """
    expected = private_names(cell)
    assert outcome.kept.names == expected
    if any(not name.endswith(COUNTERS) for name in expected):
        outcome.kept.check_control(outcome.traffic, raw=cell.codec == "none")


def check_same_weights(outcome: Outcome, plain: PlainResult, cell: Cell) -> None:
    """Assert that every weight is the plain loop's, and so are losses and accuracies."""
    assert outcome.state.keys() == plain.state.keys()
    if slack := STRATEGIES[cell.strategy].slack / 10:
        _check_distance(outcome, plain, cell, slack)
    else:
        _check_each(outcome, plain, cell)
    assert outcome.accuracies == pytest.approx(plain.accuracies, abs=1 / TEST + 1e-6 + slack)
    assert outcome.losses == pytest.approx(plain.losses, abs=1e-3 + slack)


def _check_each(outcome: Outcome, plain: PlainResult, cell: Cell) -> None:
    travels = shared(cell)
    for key, value in outcome.state.items():
        if key in travels:
            assert float((value.double() - plain.state[key]).abs().max()) <= TOLERANCE, key
        else:  # the server's own: private factors are zero there, counters were never moved
            assert not value.any(), key


def check_close(outcome: Outcome, plain: PlainResult, cell: Cell) -> None:
    """Assert that a lossy codec ends near the plain loop, having learnt as much."""
    share = QUANTISATION + STRATEGIES[cell.strategy].slack
    _check_distance(outcome, plain, cell, share)
    assert outcome.accuracies[-1] >= plain.accuracies[-1] - ACCURACY
    fallen = plain.losses[0] - plain.losses[-1]
    assert outcome.losses == pytest.approx(plain.losses, abs=share * fallen)


def _check_distance(outcome: Outcome, plain: PlainResult, cell: Cell, share: float) -> None:
    floats = [key for key, value in shared(cell).items() if value.is_floating_point()]
    way = distance(plain.state, plain.initial, floats)
    assert distance(outcome.state, plain.state, floats) <= share * way


def check_learned(outcome: Outcome, plain: PlainResult, cell: Cell) -> None:
    """Assert that the plain loop learns, so that matching it has a meaning, and the clients too."""
    assert plain.losses[-1] < plain.losses[0]
    last = outcome.client_accuracies[task_of(cell).rounds]
    exact = cell.exact and not STRATEGIES[cell.strategy].slack
    few = 1 / (HELD_OUT * task_of(cell).clients) if exact else ACCURACY
    assert last == pytest.approx(plain.client_accuracy, abs=few + 1e-6)


def check_sizes(outcome: Outcome, entries: Sequence[LedgerEntry], cell: Cell) -> None:
    """Assert that each message holds exactly what the cell shares, coded as it says."""
    travels = shared(cell)
    whole = _bytes(travels)
    assert {entry.tensors for entry in entries} == {len(travels)}
    if cell.plain:
        return
    for sent in outcome.sent:
        if not sent.arrays:
            continue
        first_contact = (sent.direction, sent.round, sent.kind) == ("down", 1, "train")
        # What a client does not hold yet goes without loss, with a header of the model's plan.
        full = 1.02 * whole + 2500
        limit = full if cell.exact or first_contact else full / 4
        where = (sent.direction, sent.round, sent.kind)
        assert sent.array_bytes <= limit, where
        assert cell.codec != "none" or sent.array_bytes > whole, where


def check_refused(outcome: Outcome, expected: Refusal) -> None:
    """Assert that the run ends as expected, with the reason, and leaves no half result."""
    said = [str(outcome.error), *outcome.log]
    assert [line for line in said if expected.words in line], said[-5:]
    assert (outcome.error is not None) == expected.raises, outcome.error
    if expected.by == "plugin":
        assert "fedpara" in str(outcome.error)
    assert bool(outcome.sent) == expected.sends
    rounds = {sent.round for sent in outcome.sent if sent.direction == "up"}
    assert not expected.raises or rounds <= {1}


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor], keys: Sequence[str]) -> float:
    """Return the Euclidean distance over all tensors named."""
    return float(sum(((a[key].double() - b[key].double()) ** 2).sum() for key in keys) ** 0.5)


def _bytes(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())
