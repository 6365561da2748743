"""Weight decay with the gradient at zero: the composed weight shrinks as a dense one would."""

import copy

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara

OPTIMIZERS = {
    "SGD": {},
    "SGD, maximize": {"maximize": True},
    "SGD, foreach": {"foreach": True},
    "AdamW": {},
    "AdamW, maximize": {"maximize": True},
    "AdamW, fused": {"fused": True},
    "Adafactor": {},
    "Muon": {},
    "NAdam, decoupled": {"decoupled_weight_decay": True},
}


def built(name, parameters):
    kind = getattr(torch.optim, name.partition(",")[0], None)
    if kind is None:
        pytest.skip(f"torch {torch.__version__} has no such optimizer")
    return kind(parameters, lr=0.1, weight_decay=0.5, **OPTIMIZERS[name])


def one_step(name, parameters):
    parameters = list(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    built(name, parameters).step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", ["lowrank", "fedpara"])
def test_as_much_as_dense(name, method):
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(64, 64, bias=False), method=method, gamma=0.3)
    dense = nn.Parameter(layer.weight.detach().clone())
    before = dense.detach().clone()
    one_step(name, layer.parameters())
    one_step(name, [dense])
    share = float((dense.detach() / before).mean())
    assert share == pytest.approx(0.95, abs=0.001)
    # What is part of the gradient is taken to first order in the learning rate.
    torch.testing.assert_close(layer.weight.detach(), dense, rtol=2e-3, atol=1e-6)


def test_maximize_climbs_as_minimizing_the_negative_descends():
    states = []
    for maximize in (False, True):
        torch.manual_seed(0)
        layer = fedpara.convert(nn.Linear(64, 64), gamma=0.3)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5, maximize=maximize)
        loss = layer(torch.ones(2, 64)).square().mean()
        (-loss if maximize else loss).backward()
        optimizer.step()
        states.append(layer.state_dict())
    torch.testing.assert_close(states[1], states[0])


class Mine(torch.optim.Optimizer):
    """Somebody's own rule, with a decay of its own and a count in each group."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.5, "made": 0})
        self.seen = []

    def step(self, closure=None):
        self.seen.append([len(group["params"]) for group in self.param_groups])
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - group["lr"] * group["weight_decay"])
            group["made"] += 1
            group["note"] = "new"


def test_an_optimizer_of_somebody_else_decays_composed_weights_too():
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(64, 64), method="fedpara", gamma=0.3)
    before, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = Mine([{"params": layer.parameters()}, {"params": [nn.Parameter(torch.ones(1))]}])
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before * 0.95, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(layer.bias.detach(), bias * 0.95)
    assert float(optimizer.param_groups[1]["params"][0]) == pytest.approx(0.95)


def test_groups_are_the_users_own_outside_of_a_step():
    layer = fedpara.convert(nn.Linear(64, 64), method="fedpara", gamma=0.3)
    optimizer = Mine(layer.parameters())
    groups, group = optimizer.param_groups, optimizer.param_groups[0]
    parameters = group["params"]
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for made in (1, 2):
        optimizer.step()
        assert optimizer.param_groups is groups
        assert len(groups) == 1
        assert groups[0] is group
        assert group["params"] is parameters
        assert group["weight_decay"] == 0.5
        assert (group["made"], group["note"]) == (made, "new")
    assert optimizer.seen == [[4, 1]] * 2  # the factors, and the bias
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["params"] == [0, 1, 2, 3, 4]


def test_a_count_that_an_optimizer_keeps_as_a_tensor_of_the_group_counts_once():
    class Counting(Mine):
        def step(self, closure=None):
            super().step()
            for group in self.param_groups:
                group.setdefault("count", torch.zeros(())).add_(1)

    layer = fedpara.convert(nn.Linear(64, 64), method="fedpara", gamma=0.3)
    optimizer = Counting(layer.parameters())
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for _ in range(3):
        optimizer.step()
    assert float(optimizer.param_groups[0]["count"]) == 3


def test_a_group_that_a_closure_adds_stays():
    layer = fedpara.convert(nn.Linear(64, 64), method="fedpara", gamma=0.3)
    more = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, weight_decay=0.5)
    calls = []

    class Twice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            closure()
            super().step()

    def closure():
        layer(torch.ones(2, 64)).sum().backward()
        if calls:
            optimizer.add_param_group({"params": [more]})
        calls.append(1)

    optimizer = Twice(layer.parameters(), lr=0.1, weight_decay=0.5)
    optimizer.step(closure)
    assert [len(group["params"]) for group in optimizer.param_groups] == [5, 1]


def test_schedulers_and_settings_between_steps_are_followed():
    """A change of the user's group takes effect in the next step."""
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(64, 64, bias=False), method="fedpara", gamma=0.3)
    dense = nn.Parameter(layer.weight.detach().clone())
    for parameters in (list(layer.parameters()), [dense]):
        optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        for decay in (0.5, 0.2, 0.0, 0.3):
            optimizer.param_groups[0]["weight_decay"] = decay
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            scheduler.step()
    torch.testing.assert_close(layer.weight.detach(), dense.detach(), rtol=1e-5, atol=1e-7)


def test_a_rate_that_is_a_tensor_and_named_parameters():
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(64, 64, bias=False), method="fedpara", gamma=0.3)
    before = layer.weight.detach().clone()
    try:
        optimizer = torch.optim.AdamW(
            layer.named_parameters(), lr=torch.tensor(0.1), weight_decay=0.5, foreach=False
        )
    except (TypeError, ValueError):
        pytest.skip(f"torch {torch.__version__} takes no names")
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before * 0.95, rtol=1e-5, atol=1e-7)
    assert optimizer.param_groups[0]["param_names"] == ["x1", "y1", "x2", "y2"]


def test_an_optimizer_s_copy_and_its_state_go_on():
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(64, 64), method="fedpara", gamma=0.3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    layer(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    other, others = copy.deepcopy((layer, optimizer))
    for one, its in ((layer, optimizer), (other, others)):
        its.zero_grad()
        one(torch.ones(2, 64)).sum().backward()
        its.step()
    for mine, theirs in zip(layer.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)
