"""The rows of Flower's matrix: every strategy, every pair of values, and a smoke part."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest
from flwr.serverapp import strategy as flower

from harness.cells.base import Cell
from harness.cells.environments import ENVIRONMENTS, LATEST, Environment
from harness.cells.flower import CODECS, METHODS, MODELS, cells
from harness.cells.pairwise import pairwise
from harness.cells.refusals import refusal
from harness.cells.strategies import STRATEGIES

NOT_TORCH = {"FedXgbBagging", "FedXgbCyclic"}


def test_every_strategy_of_flower_that_trains_torch_models_is_in_the_matrix() -> None:
    known = {spec.class_name for spec in STRATEGIES.values()}
    names = set(flower.__all__) - {"Strategy", "Result"} - NOT_TORCH
    assert len(names) >= 16
    assert names <= known


@pytest.mark.parametrize(
    "sizes", [(2, 2), (2, 3, 4), (16, 4, 4, 2), (3, 3, 3, 3), (1, 5, 2), (7, 2, 2, 2, 2)]
)
def test_pairwise_has_every_pair_of_values_and_is_much_shorter_than_all(
    sizes: tuple[int, ...],
) -> None:
    factors = {f"f{i}": [f"{i}.{j}" for j in range(size)] for i, size in enumerate(sizes)}
    rows = pairwise(factors)
    for a, b in combinations(factors, 2):
        for x, y in product(factors[a], factors[b]):
            assert any(row[a] == x and row[b] == y for row in rows), (x, y)
    largest = sorted(sizes)[-2:]
    assert len(rows) <= 1.5 * largest[0] * largest[1]
    assert rows == pairwise(factors)


@pytest.mark.parametrize("known", ENVIRONMENTS, ids=lambda known: known.name)
def test_the_cells_of_a_version_cover_all_pairs_that_can_be_trained(known: Environment) -> None:
    own = cells(known.name)
    assert len({cell.id for cell in own}) == len(own)
    trained = [cell for cell in own if refusal(cell, known.version) is None]
    for a, b in product(STRATEGIES, METHODS):
        assert any((cell.strategy, cell.method) == (a, b) for cell in trained), (a, b)
    for a, b in product(STRATEGIES, CODECS):
        possible = not (STRATEGIES[a].client_mod and b in ("int8", "balanced"))
        found = [cell for cell in own if (cell.strategy, cell.codec) == (a, b)]
        assert any(cell in trained for cell in found) == possible, (a, b)
        assert found
    for a, b in product(STRATEGIES, MODELS):
        assert any((cell.strategy, cell.model) == (a, b) for cell in own), (a, b)
    for a, b, c in product(METHODS, CODECS, MODELS):
        assert any((cell.method, cell.codec) == (a, b) for cell in trained), (a, b)
        assert any((cell.method, cell.model) == (a, c) for cell in trained), (a, c)
        assert any((cell.codec, cell.model) == (b, c) for cell in trained), (b, c)


def test_versions_are_those_of_tox_ini() -> None:
    lines = (Path(__file__).parents[1] / "tox.ini").read_text(encoding="utf-8").splitlines()
    pinned = {line.strip() for line in lines if "flwr==" in line}
    assert pinned == {f"{e.name}: flwr=={e.version}" for e in ENVIRONMENTS if e.name != LATEST}


def test_the_latest_version_trains_each_strategy_with_each_method_and_two_codecs() -> None:
    own = [cell for cell in cells(LATEST) if refusal(cell, "99.0") is None]
    for strategy, method in product(STRATEGIES, METHODS):
        codecs = {c.codec for c in own if (c.strategy, c.method) == (strategy, method)}
        assert len(codecs) >= 2, (strategy, method)
        assert "none" in codecs
    assert {c.strategy for c in own if c.method == "none" and c.codec != "none"} == set(STRATEGIES)


def test_the_smoke_part_has_each_strategy_and_refuses_none() -> None:
    own = cells(LATEST, "smoke")
    assert {cell.strategy for cell in own} == set(STRATEGIES)
    assert len(own) < len(cells(LATEST)) / 2
    assert not [cell for cell in own if refusal(cell, "1.22.0")]


def test_a_refusal_needs_a_reason_in_the_cell() -> None:
    fine = Cell("flower", "local", "fedavg", "none", "none")
    assert refusal(fine, "1.22.0") is None
    assert refusal(Cell("flower", "local", "dpclientfixed", "none", "int8"), "1.42.0")
    assert refusal(Cell("flower", "local", "fedadam", "none", "none", "batchnorm"), "1.22.0")
    assert not refusal(Cell("flower", "local", "fedadam", "none", "none", "batchnorm"), "1.28.0")
