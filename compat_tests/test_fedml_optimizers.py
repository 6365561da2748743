"""Each optimizer in FedML's single process equals the published algorithm, and each learns."""

from __future__ import annotations

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

from harness.fedml.optimizer_cases import (
    A_ROUND,
    CASES,
    CLIENTS,
    METHODS,
    ROUNDS,
    assert_same,
    published_loop,
    run_case,
)
from harness.fedml.project import dataset, model


@pytest.mark.in_turn
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_equals_the_published_algorithm_and_learns(name: str, method: str) -> None:
    case = CASES[name]
    wanted = published_loop(case, method, model())
    before = [wanted.accuracy(client, dataset(CLIENTS)[6][client]) for client in range(CLIENTS)]
    outcome = run_case(case, method, model())
    assert_same(outcome.state, wanted.run(ROUNDS, A_ROUND), case.atol)
    after = [wanted.accuracy(client, dataset(CLIENTS)[6][client]) for client in range(CLIENTS)]
    print(name, method, sum(before) / 4, sum(after) / 4)
    assert sum(after) > sum(before) + 0.3 * CLIENTS
