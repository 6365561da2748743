"""The matrix itself: its rows, and the rules that runs are held against."""

from __future__ import annotations

from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from flwr.serverapp import strategy as flower

from harness.cells.base import Cell
from harness.cells.environments import ENVIRONMENTS, LATEST, Environment
from harness.cells.flower import CODECS, METHODS, MODELS, cells
from harness.cells.pairwise import pairwise
from harness.cells.refusals import refusal
from harness.cells.strategies import STRATEGIES
from harness.oracles.replies import PlainReply, State, mean
from harness.oracles.rules import RULES

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


# The rules ---------------------------------------------------------------------------------------


def _replies(seed: int = 0) -> tuple[State, list[PlainReply]]:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> State:
        return {
            "a": torch.randn(5, 3, generator=generator, dtype=torch.float64),
            "b": torch.randn(4, generator=generator, dtype=torch.float64),
        }

    current = draw()
    sizes = (10, 20, 30, 40, 50, 60, 70)
    return current, [PlainReply(draw(), size, 0.5 + size / 100) for size in sizes]


def _far(a: State, b: State) -> float:
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n not in ("fedavg", "fedprox")])
def test_every_rule_is_another_than_fedavg(name: str) -> None:
    """So that no strategy of the matrix passes by doing what FedAvg does."""
    spec = STRATEGIES[name]
    rule = RULES[spec.rule](**spec.rule_options)
    current, replies = _replies()
    answered = [
        PlainReply(rule.client(current, reply.state), reply.size, reply.loss) for reply in replies
    ]
    assert _far(rule.server(1, current, answered), mean(replies)) > 0.05


def test_rules_come_down_to_a_mean_at_the_ends_of_their_options() -> None:
    current, replies = _replies()
    equal = [PlainReply(reply.state, 1) for reply in replies]
    weighted, plain = mean(replies), mean(equal)
    same = {
        "fedavgm": ({"server_learning_rate": 1.0, "server_momentum": 0.0}, weighted),
        "fedtrimmedavg": ({"beta": 0.0}, plain),
        "multikrum": ({"num_malicious_nodes": 0, "num_nodes_to_select": 7}, weighted),
        "bulyan": ({"num_malicious_nodes": 0}, plain),
        "qfedavg": ({"client_learning_rate": 0.1, "q": 0.0}, plain),
        "serverfixed": ({"noise_multiplier": 0.0, "clipping_norm": 1e9}, weighted),
    }
    for name, (options, expected) in same.items():
        assert _far(RULES[name](**options).server(1, current, replies), expected) < 1e-12, name


def test_robust_rules_leave_out_a_client_far_away() -> None:
    current, replies = _replies()
    wild = PlainReply({key: value + 1e6 for key, value in current.items()}, 1000)
    for name in ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"):
        spec = STRATEGIES[name]
        options = {**spec.rule_options, **({"beta": 0.25} if name == "fedtrimmedavg" else {})}
        new = RULES[spec.rule](**options).server(1, current, [*replies, wild])
        assert _far(new, current) < 10, name
    assert _far(mean([*replies, wild]), current) > 1e5
