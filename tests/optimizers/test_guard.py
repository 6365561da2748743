"""The guard's bound, its collecting rounds, and what it does in a client's round."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import Guard, LocalFedDyn, LocalScaffold, NormHistory, share_kept


def test_the_bound_is_tau_medians_of_the_last_updates():
    norms = NormHistory(Guard(tau=2.0, window=3))
    assert norms.bound() is None
    norms.add([1.0, 5.0, 2.0])
    assert norms.bound() == pytest.approx(4.0)
    norms.add([9.0])  # pushes out the 1.0
    assert norms.bound() == pytest.approx(10.0)
    assert list(norms.last) == [5.0, 2.0, 9.0]


@pytest.mark.parametrize(("norm", "bound", "kept"), [(1, None, 1), (2, 2, 1), (4, 2, 0.5)])
def test_the_share_that_counts(norm, bound, kept):
    assert share_kept(norm, bound) == pytest.approx(kept)


def test_one_pass_over_the_clients_is_collected():
    guard = Guard()
    assert [guard.collecting(r, clients=7, a_round=3) for r in (1, 2, 3, 4)] == [True] * 3 + [False]
    assert not Guard(collect=0).collecting(1, clients=7, a_round=3)


@pytest.mark.parametrize("wrong", [{"tau": 0.0}, {"tau": float("nan")}, {"window": 0}])
def test_options_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Guard(**wrong)


def step(model, lr=0.5):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    optimizer.zero_grad()
    model(torch.ones(3, 2)).square().mean().backward()
    optimizer.step()


def made():
    torch.manual_seed(0)
    return nn.Linear(2, 1)


@pytest.mark.parametrize("kind", [LocalScaffold, LocalFedDyn])
def test_beyond_the_bound_update_and_variate_are_shortened_alike(kind):
    options = {"alpha": 0.5} if kind is LocalFedDyn else {}
    start, free, bounded = made(), made(), made()
    with kind(free, **options) as whole:
        step(free)
    with kind(bounded, bound=whole.result.norm / 4, **options) as part:
        step(bounded)
    assert (whole.result.kept, part.result.kept) == (1.0, pytest.approx(0.25))
    assert part.result.norm == pytest.approx(whole.result.norm)
    for x, y, z in zip(start.parameters(), free.parameters(), bounded.parameters(), strict=True):
        assert torch.allclose(z - x, 0.25 * (y - x), atol=1e-6)
    for name, value in whole.result.own.items():
        assert torch.allclose(part.result.own[name], 0.25 * value, atol=1e-6)
        assert float(value.abs().max()) > 0


@pytest.mark.parametrize("kind", [LocalScaffold, LocalFedDyn])
def test_a_round_that_gives_nan_leaves_model_and_variate_alone(kind):
    options = {"alpha": 0.5} if kind is LocalFedDyn else {}
    model, start = made(), made()
    with kind(model, **options) as local:
        step(model, lr=float("nan"))
    assert (local.result.own, local.result.change, local.result.kept) == (None, {}, 0.0)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters(), strict=True)
    )


def test_while_collecting_steps_are_plain_and_the_variate_is_the_mean_gradient():
    model, plain = made(), made()
    own = {name: torch.full_like(p, 3.0) for name, p in model.named_parameters()}
    with LocalScaffold(model, own=own, correct=False) as local:
        step(model)
    start = {name: p.detach().clone() for name, p in plain.named_parameters()}
    step(plain)
    for name, parameter in plain.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter)
        mean = (start[name] - parameter.detach()) / 0.5
        assert torch.allclose(local.result.own[name], mean, atol=1e-6)
        assert torch.allclose(local.result.change[name], mean - 3.0, atol=1e-6)
