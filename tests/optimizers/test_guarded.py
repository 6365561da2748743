"""What an adapter's server asks of a round under the guard, and what its log says afterwards."""

import logging
import re

import pytest

from fedpara_plugins.optimizers import Guard, GuardedRounds, log_outcome

LOG = logging.getLogger("a test's")


@pytest.fixture(autouse=True)
def _all_levels(caplog):
    caplog.set_level(logging.INFO, LOG.name)


def test_it_collects_first_then_bounds_by_the_median_of_what_came(caplog):
    rounds = GuardedRounds(Guard(tau=2.0, window=3), "scaffold", LOG)
    assert rounds.begin(clients=3, a_round=2) == (False, None)
    rounds.note({"one": 1.0, "two": 9.0}, {"one": 1.0, "two": 1.0})
    assert rounds.begin(clients=3, a_round=2) == (False, 10.0)
    rounds.note({"one": 2.0, "three": 3.0}, {"one": 1.0, "three": 0.25})
    assert rounds.begin(clients=3, a_round=2) == (True, 6.0)  # of 9, 2 and 3
    assert [record.getMessage() for record in caplog.records] == [
        "fedpara: scaffold: the guard only collects in this round (1 so far)",
        "fedpara: scaffold: the guard only collects in this round (2 so far)",
        "fedpara: scaffold: the guard bounded 1 of 2 updates: three to 25%",
    ]


def test_a_round_without_clients_collects_nothing():
    rounds = GuardedRounds(Guard(), "scaffold", LOG)
    assert rounds.begin(clients=2, a_round=0) == (True, None)
    assert rounds.begin(clients=2, a_round=2) == (False, None)


def test_another_process_goes_on_where_one_was_killed():
    first, second = (GuardedRounds(Guard(tau=1.0), "scaffold", LOG) for _ in range(2))
    first.begin(clients=2, a_round=2)
    first.note({"one": 4.0}, {"one": 1.0})
    second.load_state_dict(first.state_dict())
    assert second.begin(clients=2, a_round=2) == first.begin(clients=2, a_round=2) == (True, 4.0)


def test_the_published_algorithm_has_no_guard(caplog):
    rounds = GuardedRounds(None, "scaffold", LOG)
    rounds.note({"one": 1.0}, {"one": 0.5})
    assert rounds.begin(clients=2, a_round=1) == (True, None)
    rounds.load_state_dict(rounds.state_dict())
    assert not caplog.records


@pytest.mark.parametrize(
    ("verdict", "exactly", "words"),
    [
        ("lost", False, "node 3 had lost its state .* by the clients' mean"),
        ("lost", True, "node 3 had lost its state .* of the sum exactly"),
        ("stale", False, "node 3 started from its state of round 7, .* put right next time"),
        ("taken", False, ""),
    ],
)
def test_what_is_out_of_the_ordinary_is_told(caplog, verdict, exactly, words):
    log_outcome(LOG, "scaffold", verdict, "node 3", 7, exactly=exactly)
    assert bool(caplog.records) == bool(words)
    assert re.search(words, caplog.text)
