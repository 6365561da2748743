"""Terms added to gradients, whatever loop and optimizer the user has."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError, MismatchError
from fedpara_plugins.optimizers import (
    AddedGradient,
    LocalFedDyn,
    LocalScaffold,
    subtract,
    trained_parameters,
)


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def loss(model):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    return model(x).square().mean()


def test_the_term_is_in_the_step_and_not_in_the_users_gradient():
    model = made()
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss(model).backward()
    gradients = {name: p.grad.clone() for name, p in named.items()}
    before = {name: p.detach().clone() for name, p in named.items()}
    with AddedGradient(named, lambda name, p: torch.ones_like(p)) as added:
        optimizer.step()
    for name, p in named.items():
        assert torch.equal(p.grad, gradients[name])
        assert torch.allclose(p, before[name] - 0.1 * (gradients[name] + 1), atol=1e-7)
        assert added.rates[name] == pytest.approx(0.1)
    assert added.steps == 1


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("how", ["closure", "keyword", "scaler", "unscaled"])
def test_the_term_is_in_steps_with_a_closure_and_under_a_scaler(how, fused, converted):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    model = fedpara.convert(model, method="fedpara", gamma=0.1, clip="none") if converted else model
    named = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=how in ("scaler", "unscaled"))
    x = torch.ones(2, 64)
    gradients = dict(zip(named, torch.autograd.grad(model(x).sum(), named.values()), strict=True))
    before = {name: p.detach().clone() for name, p in named.items()}

    def closure():
        optimizer.zero_grad()
        value = scaler.scale(model(x).sum())
        value.backward()
        return value

    with AddedGradient(named, lambda name, p: torch.ones_like(p)) as added:
        if how == "keyword":
            optimizer.step(closure=closure)
        elif how == "closure":
            optimizer.step(closure)
        else:
            closure()
            if how == "unscaled":
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    for name, p in named.items():
        torch.testing.assert_close(p.grad, gradients[name])
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * (gradients[name] + 1))
        assert added.rates[name] == pytest.approx(0.1)
    assert added.steps == 1


def test_a_step_that_overflows_gets_no_term_and_counts_for_nothing():
    for fused in (False, True):
        model = made()
        named = dict(model.named_parameters())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        before = {name: p.detach().clone() for name, p in named.items()}
        scaler.scale(loss(model)).backward()
        named["0.bias"].grad[0] = torch.inf
        with AddedGradient(named, lambda name, p: torch.ones_like(p)) as added:
            scaler.step(optimizer)
        assert all(torch.equal(p, before[name]) for name, p in named.items())
        assert added.steps == 0
        assert not any(added.rates.values())


class Around(torch.optim.Optimizer):
    """Takes two gradients, and steps by another optimizer."""

    def __init__(self, params, **options):
        super().__init__(params, options)
        self.base = torch.optim.SGD(self.param_groups, **options)

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
            closure()
        self.base.step()


class Child(torch.optim.SGD):
    """Takes two gradients, and steps as its parent does."""

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
            closure()
        super().step()


@pytest.mark.parametrize("kind", [Around, Child])
def test_the_term_is_added_once_whatever_the_optimizer_is_built_of(kind):
    model = nn.Linear(3, 2)
    named = dict(model.named_parameters())
    optimizer = kind(model.parameters(), lr=0.1)
    before = {name: p.detach().clone() for name, p in named.items()}

    def closure():
        optimizer.zero_grad()
        model(torch.ones(4, 3)).sum().backward()

    with AddedGradient(named, lambda name, p: torch.ones_like(p)) as added:
        optimizer.step(closure)
    for name, p in named.items():
        torch.testing.assert_close(p.grad, torch.full_like(p, 4.0))
        torch.testing.assert_close(p.detach(), before[name] - 0.1 * 5)
        assert added.rates[name] == pytest.approx(0.1)
    assert added.steps == 1


def test_a_closure_that_computes_nothing_new_gets_the_term_once():
    model = nn.Linear(3, 2)
    named = dict(model.named_parameters())
    optimizer = Child(model.parameters(), lr=0.1)
    before = model.bias.detach().clone()
    model(torch.ones(4, 3)).sum().backward()
    with AddedGradient(named, lambda name, p: torch.ones_like(p)):
        optimizer.step(lambda: None)
    torch.testing.assert_close(model.bias.detach(), before - 0.1 * 5)


def test_after_the_context_steps_are_plain_again():
    model = made()
    named = dict(model.named_parameters())
    with AddedGradient(named, lambda name, p: torch.ones_like(p)) as added:
        pass
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    for p in named.values():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in named.values()]
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(named.values(), before, strict=True))
    assert added.steps == 0


def test_the_clip_bounds_the_clients_gradient_and_not_the_term():
    """As docs/optimizers.md says: the option clip comes first."""
    model = fedpara.convert(nn.Linear(64, 64), method="fedpara", gamma=0.1, clip=1e-3)
    named = trained_parameters(model)
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with AddedGradient(named, lambda name, p: torch.ones_like(p)):
        (1000 * model(torch.ones(2, 64)).sum()).backward()
        optimizer.step()
    for name, p in named.items():
        assert torch.allclose(p, before[name] - 1, atol=2e-3), name


def test_learning_rates_that_change_are_added_up():
    model = made()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.zeros_like(p) for name, p in start.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with LocalScaffold(model) as local:
        for lr in (0.1, 0.3):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            loss(model).backward()
            gradients = {
                n: g + lr * p.grad
                for (n, p), g in zip(model.named_parameters(), gradients.values(), strict=True)
            }
            optimizer.step()
    for name, value in local.result.own.items():
        assert torch.allclose(value, gradients[name] / 0.4, atol=1e-6)


def test_frozen_parameters_buffers_and_private_names_have_no_variates():
    model = made()
    model[2].bias.requires_grad_(False)
    assert set(trained_parameters(model)) == {
        "0.weight", "0.bias", "1.weight", "1.bias", "2.weight",
    }  # fmt: skip
    personal = fedpara.convert(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)),
        method="pfedpara", gamma=0.3, private="1.*",
    )  # fmt: skip
    private = fedpara.ModelSpec.of(personal).private_keys
    assert {"1.weight", "1.bias"} < private
    names = set(trained_parameters(personal))
    assert names
    assert not names & private


def test_parameters_that_no_optimizer_moved_are_refused():
    model = made()

    def by_hand():
        with LocalFedDyn(model, alpha=0.1), torch.no_grad():
            model[0].weight.add_(1.0)

    with pytest.raises(ConfigError, match="not by a step of a torch optimizer"):
        by_hand()


def test_an_untouched_parameter_keeps_its_variate():
    model = made()
    own = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    with LocalScaffold(model, own=own) as local:
        optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
        loss(model).backward()
        optimizer.step()
    assert torch.equal(local.result.own["2.weight"], own["2.weight"])
    assert not torch.equal(local.result.own["0.weight"], own["0.weight"])


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "momentum=0.9"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
        (lambda p: torch.optim.AdamW(p), "AdamW"),
    ],
)
def test_scaffold_refuses_optimizers_that_are_not_plain_sgd(make, word):
    model = made()
    optimizer = make(model.parameters())
    loss(model).backward()
    with pytest.raises(ConfigError, match=word), LocalScaffold(model):
        optimizer.step()


def test_lbfgs_is_refused_by_both():
    model = made()
    optimizer = torch.optim.LBFGS(model.parameters())
    with pytest.raises(ConfigError, match="LBFGS"), LocalFedDyn(model, alpha=0.1):
        optimizer.step(lambda: loss(model))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        LocalFedDyn(made(), alpha=alpha)


def test_variates_of_another_model_are_refused():
    own = {name: torch.zeros_like(p) for name, p in made().named_parameters()}
    own["0.weight"] = torch.zeros(9, 9)
    with pytest.raises(MismatchError, match=r"0\.weight"):
        LocalScaffold(made(), own=own)
    del own["0.weight"]
    with pytest.raises(MismatchError, match=r"0\.weight"):
        LocalScaffold(made(), server=own)


def test_a_client_in_another_thread_may_begin_and_end_in_the_middle_of_a_step():
    """The term is asked for in the middle of a step: there another context is entered and left."""
    mine, other = nn.Linear(3, 2), nn.Linear(3, 2)
    before = [p.detach().clone() for p in mine.parameters()]

    def term(name, parameter):
        def elsewhere():
            with AddedGradient(dict(other.named_parameters()), lambda n, p: torch.ones_like(p)):
                _step(other)

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        return torch.ones_like(parameter)

    with AddedGradient(dict(mine.named_parameters()), term) as added:
        gradients = _step(mine)
    assert added.steps == 1
    for old, new, own in zip(before, mine.parameters(), gradients, strict=True):
        torch.testing.assert_close(new.detach(), old - 0.1 * (own + 1))
        torch.testing.assert_close(new.grad, own)


def _step(model):
    """One step of SGD on a fresh optimizer; the gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.zero_grad()
    model(torch.ones(4, 3)).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    return gradients


def test_equal_infinities_differ_by_zero():
    inf, nan = float("inf"), float("nan")
    before = {"a": torch.tensor([-inf, 1.0, -inf, inf, 0.0]), "n": torch.tensor(3)}
    after = {"a": torch.tensor([-inf, 3.0, inf, 2.0, nan]), "n": torch.tensor(5)}
    found = subtract(after, before)
    torch.testing.assert_close(
        found["a"], torch.tensor([0.0, 2.0, inf, -inf, nan]), equal_nan=True, rtol=0, atol=0
    )
    assert found["n"] == 2
