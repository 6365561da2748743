"""The sum over all clients, and what both sides do when a reply or a client's state is lost."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.optimizers import Contributions, CorrectionState


def tensors(value: float):
    return {"w": torch.tensor([value, -value])}


def take(sums, client, value, *, since, server_round, node=None, **more):
    node = ord(client) if node is None else node
    return sums.take(
        tensors(value), node=node, client=client, since=since, server_round=server_round, **more
    )


def mean_of(*values: float, clients: int):
    return pytest.approx(sum(values) / clients)


def test_the_mean_counts_clients_that_never_answered_with_zeros():
    sums = Contributions()
    assert sums.mean(5) == {}
    assert take(sums, "a", 1.0, since=0, server_round=1) == "new"
    assert take(sums, "b", 4.0, since=0, server_round=1) == "new"
    assert float(sums.mean(5)["w"][0]) == mean_of(1.0, 4.0, clients=5)
    assert take(sums, "a", 0.5, since=1, server_round=2) == "taken"
    assert float(sums.mean(5)["w"][0]) == mean_of(1.5, 4.0, clients=5)
    assert (sums.accepted(ord("a")), sums.accepted(ord("b")), sums.accepted(9)) == (2, 1, None)


def test_more_clients_than_were_said_count_all_the_same():
    sums = Contributions()
    for place, client in enumerate("abc"):
        take(sums, client, float(place), since=0, server_round=1)
    assert float(sums.mean(2)["w"][0]) == mean_of(0.0, 1.0, 2.0, clients=3)


def test_weights_count_and_unknown_clients_weigh_as_much_as_known_ones_do_on_average():
    sums = Contributions()
    take(sums, "a", 1.0, since=0, server_round=1, weight=10.0)
    take(sums, "b", 2.0, since=0, server_round=1, weight=30.0)
    assert float(sums.mean(2)["w"][0]) == pytest.approx((10 * 1 + 30 * 2) / 40)
    assert float(sums.mean(3)["w"][0]) == pytest.approx((10 * 1 + 30 * 2) / 60)


@pytest.mark.parametrize("remember", [True, False])
def test_a_client_that_lost_its_state_is_taken_out(remember):
    sums = Contributions(remember=remember)
    take(sums, "a", 1.0, since=0, server_round=1)
    take(sums, "b", 7.0, since=0, server_round=1)
    assert take(sums, "a", 3.0, since=0, server_round=2) == "lost"
    # Exactly, or as the average of both: 8 - 8 / 2 + 3.
    expected = 7.0 + 3.0 if remember else 8.0 / 2 + 3.0
    assert float(sums.mean(2)["w"][0]) == pytest.approx(expected / 2)
    assert take(sums, "a", 1.0, since=2, server_round=3) == "taken"


def test_a_node_with_another_clients_name_has_lost_the_old_ones_state():
    sums = Contributions(remember=True)
    take(sums, "a", 1.0, since=0, server_round=1, node=5)
    assert take(sums, "drawn-anew", 2.0, since=0, server_round=2, node=5) == "lost"
    assert float(sums.mean(1)["w"][0]) == pytest.approx(2.0)
    assert sums.accepted(5) == 2


def test_a_client_goes_on_under_another_node_id():
    """A SuperNode that was restarted, with its state kept on disk."""
    sums = Contributions()
    take(sums, "a", 1.0, since=0, server_round=1, node=5)
    assert sums.accepted(6) is None
    assert take(sums, "a", 1.0, since=1, server_round=2, node=6, connected=[6]) == "taken"
    assert float(sums.mean(1)["w"][0]) == pytest.approx(2.0)
    assert sums.accepted(6) == 2


def test_one_name_of_two_nodes_that_are_there_is_two_clients():
    sums = Contributions()
    both = {"connected": [5, 6]}
    take(sums, "a", 1.0, since=0, server_round=1, node=5, **both)
    assert take(sums, "a", 3.0, since=0, server_round=1, node=6, **both) == "new"
    assert take(sums, "a", 1.0, since=1, server_round=2, node=5, **both) == "taken"
    assert take(sums, "a", 1.0, since=1, server_round=2, node=6, **both) == "taken"
    assert float(sums.mean(2)["w"][0]) == mean_of(2.0, 4.0, clients=2)


def test_a_state_that_the_server_does_not_know_is_not_taken_in():
    """The server was started anew without its state; the client is told to begin from zero."""
    sums, kept = Contributions(), CorrectionState()
    kept.end(tensors(9.0), 4)
    assert kept.begin(sums.accepted(1)) is None
    assert take(sums, "a", 1.0, since=kept.confirmed_round, server_round=1, node=1) == "stale"
    assert sums.mean(1) == {}
    kept.end(tensors(10.0), 1)
    assert "start from zero" in kept.begin(sums.accepted(1))
    assert (kept.confirmed, kept.confirmed_round) == (None, 0)


def test_a_confirmed_round_stands_and_an_unconfirmed_one_is_undone():
    kept = CorrectionState()
    assert kept.begin(None) is None
    kept.end(tensors(1.0), 1)
    assert kept.begin(1) is None
    assert (float(kept.confirmed["w"][0]), kept.confirmed_round) == (1.0, 1)
    kept.end(tensors(2.0), 2)
    assert "never had the reply of round 2" in kept.begin(1)
    assert (float(kept.confirmed["w"][0]), kept.confirmed_round, kept.pending) == (1.0, 1, None)


def test_both_sides_agree_whatever_is_lost():
    """Replies and clients' states are lost at random; the sum is that of what clients keep."""
    generator = torch.Generator().manual_seed(1)
    sums = Contributions(remember=True)
    kept = {client: CorrectionState() for client in "abcde"}

    def chance(limit):
        return float(torch.rand((), generator=generator)) < limit

    for server_round in range(1, 200):
        for client in "abcde":
            if chance(0.5):
                continue
            if chance(0.1):
                kept[client] = CorrectionState()
            mine = kept[client]
            mine.begin(sums.accepted(ord(client)))
            before = 0.0 if mine.confirmed is None else float(mine.confirmed["w"][0])
            after = float(torch.randn((), generator=generator))
            mine.end(tensors(after), server_round)
            if not chance(0.2):
                take(
                    sums,
                    client,
                    after - before,
                    since=mine.confirmed_round,
                    server_round=server_round,
                )
    in_sum = []
    for client, mine in kept.items():
        mine.begin(sums.accepted(ord(client)))
        in_sum.append(0.0 if mine.confirmed is None else float(mine.confirmed["w"][0]))
    # Who lost its state and has not been heard since is still in the sum with its old one.
    for client, mine in kept.items():
        if mine.confirmed is None and client in sums.rounds:
            sums._remove(client)
    assert float(sums.mean(5)["w"][0]) == pytest.approx(sum(in_sum) / 5, abs=1e-4)
    assert any(in_sum)
