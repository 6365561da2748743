"""FedAvg in FedML's single process equals a plain loop; with nothing on it is FedML's own."""

from __future__ import annotations

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch

from fedpara_plugins import ModelSpec, convert
from harness.fedml_project import dataset, model, run
from harness.fedml_reference import FedAvgLoop

METHODS = ("none", "lowrank", "fedpara", "pfedpara")


def expected(method: str, rounds: int = 3, a_round: int = 2) -> dict[str, torch.Tensor]:
    net = convert(model(), method=method, gamma=0.5)
    private = ModelSpec.of(net).initial_private()
    loop = FedAvgLoop(net, dataset()[5], private=private)
    return loop.run(rounds, a_round)


@pytest.mark.parametrize("method", METHODS)
def test_equals_a_plain_loop(method: str) -> None:
    found = run(fedpara_method=method, fedpara_gamma=0.5, fedpara_mend=True).state
    wanted = expected(method)
    assert wanted.keys() <= found.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    private = found.keys() - wanted.keys()
    assert bool(private) == (method == "pfedpara")
    assert all(not found[name].any() for name in private)


def test_with_nothing_on_it_is_fedmls_own_run() -> None:
    ours, theirs = run().state, run(plain=True).state
    assert type(run().runner.runner).__module__.startswith("fedml.")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # FedML's own first round trains clients one after the other on each other's result.
    wanted = expected("none")
    assert any((theirs[name] - wanted[name]).abs().max() > 1e-3 for name in wanted)
