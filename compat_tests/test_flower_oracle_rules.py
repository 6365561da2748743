"""The rules in plain torch that Flower's runs are compared with: each differs from FedAvg."""

from __future__ import annotations

import pytest
import torch

from harness.cells.strategies import STRATEGIES
from harness.oracles.replies import PlainReply, State, mean
from harness.oracles.rules import RULES


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
