"""Each kind of training loop moves the model as the same loop with the options written out."""

import copy
import functools
import itertools
import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import LocalFedDyn
from fedpara_plugins.training import round_progress, start_round
from harness.oracles.plain_steps import (
    PlainNet,
    PlainOptions,
    batches,
    distance,
    loss_of,
    plain_steps,
)

LR = 0.01
PLAIN = {"variance": "torch", "speed": 0.25, "private_speed": 0.2}
"""Slow enough to stay finite where nothing bounds the steps."""

SLOW = {"speed": 0.1, "private_speed": 0.1}
OPTIONS = {
    "clip": ({"clip": 0.5}, PlainOptions(clip=0.5)),
    "relative": ({"clip": "relative:0.002", **SLOW}, PlainOptions(relative=0.002, speed=0.1)),
    "decay": ({"decay": "composed"}, PlainOptions(decay=0.5)),
    "schedule": ({"schedule": "decoupled", "private_steps": 2}, PlainOptions(private_steps=2)),
    "all": (
        {"clip": 0.5, "decay": "composed", "schedule": "decoupled", "private_steps": 2},
        PlainOptions(clip=0.5, decay=0.5, private_steps=2),
    ),
    "all, relative": (
        {"clip": "relative:0.002", "schedule": "decoupled", "private_steps": 2, **SLOW},
        PlainOptions(relative=0.002, speed=0.1, decay=0.5, private_steps=2),
    ),
}
NEAR = 2e-4
"""Float32, some steps."""


def build(method="pfedpara", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40))
    options = {"method": method, "gamma": 0.5, "clip": "none", **PLAIN, **options}
    return fedpara.convert(model, **options)


def loss(model, x):
    return loss_of(model(x))


def sgd(parameters, decay=0.0, **options):
    return torch.optim.SGD(
        parameters, **{"lr": LR, "momentum": 0.9, "weight_decay": decay, **options}
    )


def adamw(parameters, decay=0.0, **options):
    return torch.optim.AdamW(parameters, lr=LR, weight_decay=decay, **options)


def backward_then_step(model, optimizer, steps):
    for accumulated in steps:
        optimizer.zero_grad()
        for x in accumulated:
            (loss(model, x) / len(accumulated)).backward()
        optimizer.step()


def with_closure(model, optimizer, steps, call=lambda optimizer, closure: optimizer.step(closure)):
    for accumulated in steps:

        def closure(accumulated=accumulated):
            optimizer.zero_grad()
            total = sum(loss(model, x) / len(accumulated) for x in accumulated)
            total.backward()
            return total

        assert call(optimizer, closure).ndim == 0


def by_keyword(model, optimizer, steps):
    with_closure(model, optimizer, steps, lambda o, closure: o.step(closure=closure))


def scaled(model, optimizer, steps, scale=1024.0, unscale=False, overflow=()):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, backoff_factor=0.5)
    for place, accumulated in enumerate(steps):
        optimizer.zero_grad()
        for x in accumulated:
            scaler.scale(loss(model, x) / len(accumulated)).backward()
        if place in overflow:
            next(p for p in model.parameters() if p.grad is not None).grad.view(-1)[0] = torch.inf
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()


def unscaled_by_user(model, optimizer, steps):
    scaled(model, optimizer, steps, unscale=True)


LOOPS = [backward_then_step, with_closure, by_keyword, scaled, unscaled_by_user]
MAKERS = {
    "SGD": (sgd, {}, False),
    "SGD, foreach": (sgd, {"foreach": True}, False),
    "SGD, fused": (sgd, {"fused": True}, False),
    "AdamW": (adamw, {}, True),
    "AdamW, foreach": (adamw, {"foreach": True}, True),
    "AdamW, fused": (adamw, {"fused": True}, True),
}


def two_each(count=5):
    """The batches of some steps, two accumulated in each."""
    drawn = batches(2 * count)
    return [drawn[place : place + 2] for place in range(0, 2 * count, 2)]


def expected(model, make, options, steps, method="pfedpara", **more):
    return plain_steps(PlainNet(model, method), make, steps, options, **more)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        *((name, option) for name in ("SGD", "AdamW") for option in OPTIONS),
        *((name, kind) for name in MAKERS if "," in name for kind in ("all", "all, relative")),
    ],
)
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_loops(loop, name, option):
    make, more, decoupled = MAKERS[name]
    options, plain = OPTIONS[option]
    if decoupled:
        plain = PlainOptions(**{**vars(plain), "decoupled": True})
    model = build(**options)
    net = expected(model, make, plain, two_each())
    free = expected(model, make, PlainOptions(decoupled=decoupled), two_each())
    assert distance(model, net) == 1.0
    loop(model, make(model.parameters(), plain.decay, **more), two_each())
    assert distance(model, net) < NEAR
    assert distance(model, free) > 100 * NEAR  # the option has acted


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("method", ["lowrank", "fedpara"])
def test_decay_of_other_methods_under_a_closure(name, method):
    make, more, decoupled = MAKERS[name]
    plain = PlainOptions(decay=0.5, decoupled=decoupled)
    model = build(method)
    net = expected(model, make, plain, two_each(), method)
    with_closure(model, make(model.parameters(), 0.5, **more), two_each())
    assert distance(model, net) < NEAR


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_step_that_overflows_changes_nothing_and_counts_for_nothing(name, unscale):
    make, more, decoupled = MAKERS[name]
    if make is sgd:  # torch's fused momentum is not initialised by a first step that is skipped
        make = functools.partial(sgd, momentum=0.0)
    options, plain = OPTIONS["all"]
    plain = PlainOptions(**{**vars(plain), "decoupled": decoupled})
    model = build(**options)
    optimizer = make(model.parameters(), 0.5, **more)
    before = copy.deepcopy(model.state_dict())
    scaled(model, optimizer, two_each()[:1], unscale=unscale, overflow=(0,))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert round_progress(model).steps == 0
    net = expected(model, make, plain, two_each(), skipped=(1, 3))
    scaled(model, optimizer, two_each(), unscale=unscale, overflow=(1, 3))
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 3


def test_a_scaler_that_is_off_is_none():
    model = build(clip=0.5)
    net = expected(model, sgd, PlainOptions(clip=0.5), two_each())
    optimizer = sgd(model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for accumulated in two_each():
        optimizer.zero_grad()
        for x in accumulated:
            scaler.scale(loss(model, x) / 2).backward()
        scaler.step(optimizer)
        scaler.update()
    assert distance(model, net) < NEAR


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")
def test_an_optimizer_that_asks_the_scaler_itself():
    class Own(torch.optim.SGD):
        def step(self, closure=None, grad_scaler=None):
            grad_scaler.unscale_(self)
            super().step(closure)

    model = build(clip=0.5)
    net = expected(model, sgd, PlainOptions(clip=0.5), two_each())
    optimizer = Own(model.parameters(), lr=LR, momentum=0.9)
    optimizer._step_supports_amp_scaling = True
    scaled(model, optimizer, two_each())
    assert distance(model, net) < NEAR


# Several gradients a step


class TwiceOnSGD(torch.optim.SGD):
    """A step from the mean of two points, by a step of its parent: as some SAMs are written."""

    def step(self, closure):
        with torch.enable_grad():
            closure()
        held = [p for group in self.param_groups for p in group["params"]]
        for p in held:
            if p.grad is not None:
                p.data.add_(p.grad, alpha=0.01)
                self.state[p]["moved"] = 0.01 * p.grad.clone()
        with torch.enable_grad():
            value = closure()
        for p in held:
            if "moved" in self.state[p]:
                p.data.sub_(self.state[p].pop("moved"))
        super().step()
        return value


def twice(net, x, options, steps_made):
    """The same in plain torch, with the options written out at both points."""
    phase = "private" if steps_made < (options.private_steps or 0) else "shared"
    phase = "joint" if options.private_steps is None else phase

    def gradient():
        for value in net.values.values():
            value.grad = None
        net.loss(x, phase).backward()
        moving = {
            name: value.grad
            for name, value in net.values.items()
            if value.grad is not None
            and (phase == "joint" or (name in net.private()) == (phase == "private"))
        }
        if options.clip is None:
            return {name: net.held(name, g, options, LR) for name, g in moving.items()}
        norm = torch.cat([g.flatten() for g in moving.values()]).norm()
        return {name: g * min(1.0, options.clip / float(norm)) for name, g in moving.items()}

    with torch.no_grad():
        with torch.enable_grad():
            first = gradient()
        for name, g in first.items():
            net.values[name].add_(g, alpha=0.01)
        with torch.enable_grad():
            second = gradient()
        for name, g in first.items():
            net.values[name].sub_(g, alpha=0.01)
        for name, g in second.items():
            value = net.values[name]
            share = options.decay / net.factors_together(name)
            value.sub_(g + share * value, alpha=LR)


@pytest.mark.parametrize("parent_first", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_with_two_gradients_and_a_parents_step(option, parent_first):
    """Hooks run in the parent's step too, once the parent has been used by itself."""
    if parent_first:
        torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    options, plain = OPTIONS[option]
    model = build(**options)
    net = PlainNet(model, "pfedpara")
    for made, x in enumerate(batches(4)):
        twice(net, x, plain, made)
    optimizer = TwiceOnSGD(model.parameters(), lr=LR, weight_decay=plain.decay)
    with_closure(model, optimizer, [[x] for x in batches(4)])
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 4


def in_double(count):
    """Line searches amplify what float32 rounds."""
    return [x.double() for x in batches(count)]


@pytest.mark.parametrize(
    ("bound", "search"),
    [
        *itertools.product([None, 2.0], [None, "strong_wolfe"]),
        ("relative:0.0001", "strong_wolfe"),  # the search bounds the step
    ],
)
def test_lbfgs_with_and_without_clip(bound, search):
    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, lr=0.05, max_iter=6, line_search_fn=search)

    model = build(clip=bound).double()
    net = PlainNet(model, "pfedpara")
    plain = lbfgs(list(net.values.values()))
    calls = []
    for x in in_double(3):

        def closure(x=x):
            plain.zero_grad()
            value = net.loss(x)
            value.backward()
            calls.append(1)
            if isinstance(bound, float):
                nn.utils.clip_grad_norm_(list(net.values.values()), bound)
            return value

        plain.step(closure)
    assert len(calls) > 6  # several closures a step
    with_closure(model, lbfgs(model.parameters()), [[x] for x in in_double(3)])
    assert distance(model, net) < 1e-8
    assert round_progress(model).steps == 3


def test_lbfgs_in_the_decoupled_schedule():
    """Each phase is a run of its own on the parameters of that phase, in each round."""

    def lbfgs(parameters):
        return torch.optim.LBFGS(parameters, lr=0.02, max_iter=4)

    model = build(schedule="decoupled", private_steps=2).double()
    with torch.no_grad():
        model[0].x2.normal_(0, 0.1)
        model[0].y2.normal_(0, 0.1)
    net = PlainNet(model, "pfedpara")
    optimizer = lbfgs(model.parameters())
    for _ in range(2):
        for phase, some in (("private", in_double(4)[:2]), ("shared", in_double(4)[2:])):
            moving = [
                v for n, v in net.values.items() if (n in net.private()) == (phase == "private")
            ]
            plain = lbfgs(moving)
            for x in some:

                def closure(x=x, plain=plain, phase=phase):
                    plain.zero_grad()
                    value = net.loss(x, phase)
                    value.backward()
                    return value

                plain.step(closure)
        start_round(model)
        for place, x in enumerate(in_double(4)):
            before = copy.deepcopy(model.state_dict())
            with_closure(model, optimizer, [[x]])
            moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
            assert moved
            assert all((name in net.private()) == (place < 2) for name in moved)
    assert distance(model, net) < 1e-8


def test_a_closure_without_backward_acts_once_on_the_gradients_that_are_there():
    model = build(clip=0.5)
    net = expected(model, sgd, PlainOptions(clip=0.5, decay=0.5), two_each())
    optimizer = sgd(model.parameters(), 0.5)
    for accumulated in two_each():
        optimizer.zero_grad()
        total = sum(loss(model, x) / 2 for x in accumulated)
        total.backward()
        optimizer.step(lambda total=total: total)
    assert distance(model, net) < NEAR


def test_a_closure_that_is_never_called_is_logged(caplog):
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.sub_(p.grad, alpha=LR)

    model = build(clip=0.5)
    optimizer = Deaf(model.parameters(), lr=LR)
    loss(model, batches(1)[0]).backward()
    optimizer.step(lambda: None)
    assert "Deaf was given a closure and did not call it" in caplog.text


def test_an_error_in_a_step_leaves_nothing_behind():
    model = build(clip=0.5)
    net = expected(model, sgd, PlainOptions(clip=0.5, decay=0.5), two_each())
    optimizer = sgd(model.parameters(), 0.5)
    groups = optimizer.param_groups
    steps = two_each()
    with_closure(model, optimizer, steps[:2])

    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(fails)
    assert optimizer.param_groups is groups
    state = optimizer.state[model[0].x1]
    kept, state["momentum_buffer"] = state["momentum_buffer"], "no tensor"
    with pytest.raises(Exception, match=r"str|tensor|Tensor"):
        backward_then_step(model, optimizer, steps[2:3])
    assert optimizer.param_groups is not groups  # torch calls no hook then
    state["momentum_buffer"] = kept
    with_closure(model, optimizer, steps[2:])
    assert optimizer.param_groups is groups
    assert round_progress(model).steps == 5
    assert distance(model, net) < 0.2  # the failed step has moved a part of the parameters


# Optimizers around others


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as its public implementation has it."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        for p in held:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * self.param_groups[0]["rho"] / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


def sam_in_plain_torch(net, x, clip, decay):
    def gradients():
        for value in net.values.values():
            value.grad = None
        net.loss(x).backward()
        return {name: value.grad for name, value in net.values.items()}

    def norm(found):
        return torch.cat([g.flatten() for g in found.values()]).norm()

    first = gradients()
    start = {name: value.detach().clone() for name, value in net.values.items()}
    with torch.no_grad():
        for name, value in net.values.items():
            value.add_(0.05 * first[name] / norm(first))
    second = gradients()
    size = min(1.0, clip / float(norm(second)))
    with torch.no_grad():
        for name, value in net.values.items():
            share = decay / net.factors_together(name)
            value.copy_(start[name] - LR * (size * second[name] + share * start[name]))


@pytest.mark.parametrize("in_two_calls", [False, True])
def test_sam_around_sgd(in_two_calls):
    model = build(clip=0.5)
    net = PlainNet(model, "pfedpara")
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR, weight_decay=0.5)
    for x in batches(4):
        sam_in_plain_torch(net, x, 0.5, 0.5)
        loss(model, x).backward()
        if in_two_calls:
            optimizer.first_step()
            loss(model, x).backward()
            optimizer.second_step()
        else:
            optimizer.step(lambda x=x: loss(model, x).backward())
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 4


def test_sam_refuses_the_decoupled_schedule_at_its_first_step():
    model = build(schedule="decoupled", private_steps=2)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=LR)
    before = copy.deepcopy(model.state_dict())
    loss(model, batches(1)[0]).backward()
    with pytest.raises(ConfigError, match=r"'schedule'.*SAM.*schedule='joint'"):
        optimizer.step(lambda: loss(model, batches(1)[0]).backward())
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key])


class Lookahead(torch.optim.Optimizer):
    """Steps by another optimizer, and pulls back to a slow copy now and then."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        super().__init__([p for g in optimizer.param_groups for p in g["params"]], {})

    def step(self, closure=None):
        return self.optimizer.step(closure)


@pytest.mark.parametrize("loop", [backward_then_step, with_closure])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_optimizer_around_another_acts_once(option, loop):
    options, plain = OPTIONS[option]
    model = build(**options)
    net = expected(model, sgd, plain, two_each())
    loop(model, Lookahead(sgd(model.parameters(), plain.decay)), two_each())
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 5


@pytest.mark.parametrize("parent_first", [False, True])
def test_a_subclass_that_calls_its_parents_step_acts_once(parent_first):
    class Mine(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    if parent_first:
        torch.optim.AdamW([nn.Parameter(torch.ones(1))], lr=1.0)
    options, plain = OPTIONS["all"]
    model = build(**options)
    plain = PlainOptions(**{**vars(plain), "decoupled": True})
    net = expected(model, adamw, plain, two_each())
    optimizer = Mine(model.parameters(), lr=LR, weight_decay=0.5)
    with_closure(model, optimizer, two_each()[:3])
    backward_then_step(model, optimizer, two_each()[3:])
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 5


def test_the_multi_tensor_optimizers_of_older_code():
    from torch.optim import _multi_tensor

    options, plain = OPTIONS["all"]
    model = build(**options)
    net = expected(model, sgd, plain, two_each())
    optimizer = _multi_tensor.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=0.5)
    backward_then_step(model, optimizer, two_each())
    assert distance(model, net) < NEAR


# Several optimizers


def split(model, dense_only):
    """Parameters of two optimizers: layer by layer, or factors and what is dense."""
    named = list(model.named_parameters())
    first = [p for n, p in named if (n.endswith("bias") if dense_only else n.startswith("0."))]
    held = {id(p) for p in first}
    return first, [p for _, p in named if id(p) not in held]


def with_dense_layer(**options):
    """A model whose middle layer stays dense, so that an optimizer may hold no factor at all."""
    torch.manual_seed(0)
    layers = [nn.Linear(64, 96), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 40)]
    options = {"method": "pfedpara", "gamma": 0.5, "exclude": "1", **options}
    return fedpara.convert(nn.Sequential(*layers), **options)


@pytest.mark.parametrize("dense_only", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_two_optimizers_make_one_step_of_the_model(option, dense_only, caplog):
    options, plain = OPTIONS[option]
    model = build(**options)
    net = expected(model, sgd, plain, two_each())
    both = [sgd(part, plain.decay) for part in split(model, dense_only)]
    for accumulated in two_each():
        for optimizer in both:
            optimizer.zero_grad()
        for x in accumulated:
            (loss(model, x) / 2).backward()
        for optimizer in both:
            optimizer.step()
            optimizer.zero_grad()
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 5
    assert not caplog.records


@pytest.mark.parametrize("order", [(False, True, None), (True, None, False), (None, True, False)])
def test_an_optimizer_of_each_half_in_the_decoupled_schedule(order):
    """That of the shared factors has no gradients in private steps."""
    options, plain = OPTIONS["schedule"]
    model = build(**options)
    net = expected(model, sgd, plain, two_each())
    named = dict(model.named_parameters())
    halves = {True: [], False: [], None: []}
    for name, p in named.items():
        halves[None if name.endswith("bias") else name in net.private()].append(p)
    all_three = [sgd(halves[key]) for key in order]
    for accumulated in two_each():
        for optimizer in all_three:
            optimizer.zero_grad()
        for x in accumulated:
            (loss(model, x) / 2).backward()
        for optimizer in all_three:
            optimizer.step()
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 5


class Several(torch.optim.Optimizer):
    """One optimizer in front of some, as code with one of each for matrices and vectors has it."""

    def __init__(self, optimizers):
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})

    def step(self, closure=None):
        held = self.optimizers
        for optimizer in held.values() if isinstance(held, dict) else held:
            optimizer.step()


@pytest.mark.parametrize("kind", [list, tuple, lambda both: dict(enumerate(both))])
def test_an_optimizer_in_front_of_several_acts_once(kind):
    options, plain = OPTIONS["all"]
    model = build(**options)
    net = expected(model, sgd, plain, two_each())
    both = [sgd(part, plain.decay) for part in split(model, False)]
    front = Several(both)
    front.optimizers = kind(both)
    backward_then_step(model, front, two_each())
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 5


def test_the_step_of_two_optimizers_is_bounded_as_one():
    model = build(clip=0.5)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    loss(model, batches(1)[0]).backward()
    for part in split(model, False):
        torch.optim.SGD(part, lr=1.0).step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.5, rel=1e-4)


def test_an_optimizer_of_dense_layers_alone_is_bounded_and_scheduled():
    model = with_dense_layer(clip=0.5)
    dense = torch.optim.SGD(model[1].parameters(), lr=1.0)
    before = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    loss(model, batches(1)[0]).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    own = torch.cat([p.grad.flatten() for p in model[1].parameters()]).norm()
    dense.step()
    moved = torch.cat(
        [(b - p).flatten() for b, p in zip(before, model[1].parameters(), strict=True)]
    )
    assert float(moved.norm()) == pytest.approx(float(0.5 * own / whole), rel=1e-4)
    for other in (
        with_dense_layer(schedule="decoupled", private_steps=1),
        copy.deepcopy(with_dense_layer(schedule="decoupled", private_steps=1)),
    ):
        dense = torch.optim.SGD(other[1].parameters(), lr=1.0)
        for moves in (False, True):
            weight = other[1].weight.detach().clone()
            loss(other, batches(1)[0]).backward()
            dense.step()
            dense.zero_grad()
            assert torch.equal(other[1].weight, weight) != moves


@pytest.mark.parametrize("fused", [False, True])
def test_two_optimizers_under_a_scaler_are_bounded_one_by_one_and_the_log_says_so(fused, caplog):
    options, _ = OPTIONS["all"]
    model = build(**{**options, "private_steps": 1, "decay": "factors"})
    net = PlainNet(model, "pfedpara")
    both = [torch.optim.SGD(part, lr=LR, fused=fused) for part in split(model, False)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for made, x in enumerate(batches(3)):
        phase = "private" if made == 0 else "shared"
        for value in net.values.values():
            value.grad = None
        net.loss(x, phase).backward()
        with torch.no_grad():
            for start in ("0.", "2."):
                moving = [
                    value for name, value in net.values.items()
                    if name.startswith(start) and (name in net.private()) == (made == 0)
                ]  # fmt: skip
                norm = torch.cat([value.grad.flatten() for value in moving]).norm()
                for value in moving:
                    value.sub_(value.grad, alpha=LR * min(1.0, 0.5 / float(norm)))
        for optimizer in both:
            optimizer.zero_grad()
        scaler.scale(loss(model, x)).backward()
        for optimizer in both:
            scaler.step(optimizer)
        scaler.update()
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 3
    said = [record for record in caplog.records if "only a part" in record.getMessage()]
    assert len(said) == 1
    assert "scaled" in said[0].getMessage()
    assert said[0].levelno == logging.WARNING


def test_two_optimizers_in_turn_are_two_steps(caplog):
    """Each has a loss of its own: what waits for the other is in the norm, and keeps its length."""
    model = build(clip=0.5)
    net = PlainNet(model, "pfedpara")
    both = [torch.optim.SGD(part, lr=LR) for part in split(model, False)]
    drawn = batches(6)
    for x, place in zip(drawn, (0, 1, 0, 1, 0, 1), strict=True):
        start = ("0.", "2.")[place]
        for value in net.values.values():
            value.grad = None
        net.loss(x).backward()
        norm = torch.cat([value.grad.flatten() for value in net.values.values()]).norm()
        with torch.no_grad():
            for name, value in net.values.items():
                if name.startswith(start):
                    value.sub_(value.grad, alpha=LR * min(1.0, 0.5 / float(norm)))
        for optimizer in both:
            optimizer.zero_grad()
        loss(model, x).backward()
        waiting = [p.grad.clone() for g in both[1 - place].param_groups for p in g["params"]]
        both[place].step()
        for before, p in zip(waiting, both[1 - place].param_groups[0]["params"], strict=True):
            assert torch.equal(p.grad, before)
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 6


def test_a_gradient_that_was_added_to_is_a_new_one():
    """Between the two optimizers' steps lies a backward pass, which adds to what waits."""
    model = build(clip=0.5)
    first, second = (torch.optim.SGD(part, lr=1.0) for part in split(model, False))
    one, other = batches(2)
    loss(model, one).backward()
    first.step()
    first.zero_grad()
    loss(model, other).backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    own = torch.cat([p.grad.flatten() for p in second.param_groups[0]["params"]])
    before = torch.cat([p.detach().flatten() for p in second.param_groups[0]["params"]])
    second.step()
    after = torch.cat([p.detach().flatten() for p in second.param_groups[0]["params"]])
    torch.testing.assert_close(before - after, own * 0.5 / gradients.norm(), rtol=1e-4, atol=1e-6)
    assert round_progress(model).steps == 2


# Steps within a backward pass


def step_in_backward(model, make=sgd, trained=None):
    """Give each parameter an optimizer, which steps when its gradient is there."""
    each = {p: make([p]) for p in trained or model.parameters()}

    def step(parameter):
        each[parameter].step()
        each[parameter].zero_grad()

    return [parameter.register_post_accumulate_grad_hook(step) for parameter in each]


def test_steps_within_a_backward_pass_are_bounded_and_logged(caplog):
    model = build(clip=0.5)
    step_in_backward(model, lambda p: torch.optim.SGD(p, lr=1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    net = PlainNet(model, "pfedpara")
    net.loss(batches(1)[0]).backward()
    loss(model, batches(1)[0]).backward()
    for name, parameter in model.named_parameters():
        gradient = net.values[name].grad
        wanted = gradient * min(1.0, 0.5 / (float(gradient.norm()) + 1e-6))
        torch.testing.assert_close(before[name] - parameter, wanted, rtol=1e-4, atol=1e-6)
    assert "not all others have gradients at the same time" in caplog.text
    assert round_progress(model).steps == 1


@pytest.mark.parametrize("make", [sgd, functools.partial(adamw, foreach=True)])
@pytest.mark.parametrize("option", ["decay", "schedule"])
def test_steps_within_a_backward_pass(make, option):
    """Two rounds; each pass is one step of the model, in the phase of its forward."""
    options, plain = OPTIONS[option]
    plain = PlainOptions(**{**vars(plain), "decoupled": make is not sgd})
    model = build(**options)
    net = PlainNet(model, "pfedpara")
    step_in_backward(model, functools.partial(make, decay=plain.decay))
    optimizer = make(list(net.values.values()))
    for _ in range(2):
        start_round(model)
        plain_steps(net, lambda _: optimizer, [[x] for x in batches(5)], plain)
        for x in batches(5):
            loss(model, x).backward()
        assert round_progress(model).steps == 5
    assert distance(model, net) < NEAR


def test_some_optimizers_step_within_the_backward_pass_and_some_after_it():
    model = build(schedule="decoupled", private_steps=2)
    net = expected(model, sgd, PlainOptions(private_steps=2), [[x] for x in batches(5)])
    amid, after = split(model, False)
    step_in_backward(model, trained=amid)
    optimizer = sgd(after)
    for x in batches(5):
        optimizer.zero_grad()
        loss(model, x).backward()
        optimizer.step()
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 5


class Checkpointed(nn.Module):
    """A net of which the backward pass computes the forward again."""

    def __init__(self, net, reentrant):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        return checkpoint(self.net, x.requires_grad_(), use_reentrant=self.reentrant)


def test_a_forward_that_a_backward_pass_repeats_is_of_the_same_phase():
    model = build(schedule="decoupled", private_steps=2)
    net = expected(model, sgd, PlainOptions(private_steps=2), [[x] for x in batches(5)])
    step_in_backward(model)
    for x in batches(5):
        loss(Checkpointed(model, False), x).backward()
    assert distance(model, net) < NEAR


def test_steps_in_the_backward_pass_of_weights_that_were_composed_once():
    """The gradients of all weights reach their factors in one pass."""
    model = build(schedule="decoupled", private_steps=2)
    net = PlainNet(model, "pfedpara")
    names = [name for name in net.values if not name.endswith("bias")]
    plain_steps(net, sgd, two_each(), PlainOptions(private_steps=2), names=names)
    for layer in (model[0], model[2]):
        layer.bias.requires_grad_(False)
    step_in_backward(model, trained=[p for p in model.parameters() if p.requires_grad])
    for accumulated in two_each():
        with fedpara.composed_once(model):
            for x in accumulated:
                (loss(model, x) / 2).backward()
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 5


def test_a_backward_pass_inside_of_another_is_refused_by_the_decoupled_schedule():
    model = build(schedule="decoupled")
    step_in_backward(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"'schedule'.*use_reentrant=False"):
        loss(Checkpointed(model, True), batches(1)[0]).backward()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_backward_pass_that_fails_does_not_count():
    model = build(schedule="decoupled", private_steps=1)
    step_in_backward(model)

    def fail(gradient):
        raise ValueError("broken")

    broken = model[0].y2.register_hook(fail)
    with pytest.raises(ValueError, match="broken"):
        loss(model, batches(1)[0]).backward()
    assert (round_progress(model).steps, model[0].phase) == (0, "private")
    broken.remove()
    loss(model, batches(1)[0]).backward()
    assert (round_progress(model).steps, model[0].phase) == (1, "shared")


# Parameter groups that change


def test_groups_that_are_replaced_and_refilled():
    """The number of parameters stays, and the parameters are another model's."""
    options, plain = OPTIONS["all"]
    first, second = build(**options), build(**options)
    optimizer = torch.optim.SGD(first.parameters(), lr=LR, weight_decay=0.5)
    backward_then_step(first, optimizer, two_each())
    net = expected(second, lambda p: torch.optim.SGD(p, lr=LR), plain, two_each())
    optimizer.param_groups[0]["params"] = list(second.parameters())
    backward_then_step(second, optimizer, two_each())
    assert distance(second, net) < NEAR
    assert round_progress(first).steps == 5
    assert round_progress(second).steps == 5
    third = build(**options)
    net = expected(third, lambda p: torch.optim.SGD(p, lr=LR), plain, two_each())
    optimizer.param_groups.clear()
    optimizer.add_param_group({"params": list(third.parameters())})
    with_closure(third, optimizer, two_each())
    assert distance(third, net) < NEAR


def test_a_group_that_is_added_later():
    model = build(clip=0.5)
    first, second = split(model, False)
    optimizer = torch.optim.SGD(first, lr=1.0)
    loss(model, batches(1)[0]).backward()
    optimizer.step()
    optimizer.add_param_group({"params": second})
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    optimizer.zero_grad()
    loss(model, batches(1)[0]).backward()
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.5, rel=1e-4)


def test_parameters_of_two_models_in_one_optimizer():
    first, second = build(clip=0.5), build(clip=2.0)
    nets = [
        expected(first, sgd, PlainOptions(clip=0.5), two_each()),
        expected(second, sgd, PlainOptions(clip=2.0), two_each()),
    ]
    optimizer = sgd([*first.parameters(), *second.parameters()])
    for accumulated in two_each():
        optimizer.zero_grad()
        for x in accumulated:
            ((loss(first, x) + loss(second, x)) / 2).backward()
        optimizer.step()
    assert distance(first, nets[0]) < NEAR
    assert distance(second, nets[1]) < NEAR


# What is seen of it


@pytest.mark.parametrize("kind", [pytest.param("method", marks=pytest.mark.compiler), "function"])
def test_compiled_steps(kind):
    options, plain = OPTIONS["all"]
    model = build(**options)
    net = expected(model, sgd, plain, two_each())
    optimizer = sgd(model.parameters(), 0.5)
    whole = optimizer.step if kind == "method" else lambda: optimizer.step()
    compiled = torch.compile(whole, backend="eager")
    for accumulated in two_each():
        optimizer.zero_grad()
        for x in accumulated:
            (loss(model, x) / 2).backward()
        compiled()
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 5


def test_a_step_in_one_compiled_graph_is_an_error_that_names_options_and_remedy():
    model = build(clip=0.5)
    optimizer = sgd(model.parameters())
    loss(model, batches(1)[0]).backward()
    before = copy.deepcopy(model.state_dict())
    compiled = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"clip, decay and schedule .*without fullgraph=True"):
        compiled()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_gradient_that_is_not_finite_is_logged_with_its_step_once_a_round(caplog):
    model = build(clip=0.5)
    optimizer = sgd(model.parameters())
    drawn = batches(4)
    drawn[2].fill_(torch.nan)
    with_closure(model, optimizer, [[x] for x in drawn])
    said = [r.getMessage() for r in caplog.records if "NaN" in r.getMessage()]
    assert len(said) == 1
    assert "gradient of step 3 of this round (SGD)" in said[0]
    assert "clip cannot bound" in said[0]


def test_steps_under_a_scaler_that_overflow_are_not_logged(caplog):
    for fused in (False, True):
        model = build(clip=0.5)
        scaled(model, sgd(model.parameters(), fused=fused), two_each(), overflow=(1,))
    assert "NaN" not in caplog.text


@pytest.mark.parametrize("loop", [backward_then_step, with_closure])
def test_the_options_act_after_the_hooks_of_the_optimizer(loop):
    """They may change gradients too, and may come at any time."""
    options, plain = OPTIONS["all"]
    model = build(**options)
    steps = [[x] for x in batches(5)]
    net = expected(model, sgd, plain, steps)
    optimizer = sgd(model.parameters(), 0.5)

    def enlarge(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(1000)

    first = optimizer.register_step_pre_hook(enlarge)
    loop(model, optimizer, steps[:2])
    optimizer.register_step_pre_hook(enlarge)
    loop(model, optimizer, steps[2:4])
    first.remove()
    loop(model, optimizer, steps[4:])
    assert distance(model, net) < NEAR
    assert round_progress(model).steps == 5


def test_hooks_after_the_step_see_the_user_s_own_groups_and_gradients():
    model = build(method="fedpara", decay="composed")
    optimizer = sgd(model.parameters(), 0.5)
    gradients, groups, same = [], [], []

    def look(optimizer, args, kwargs):
        groups.append((len(optimizer.param_groups), optimizer.param_groups[0]["weight_decay"]))
        same.append(all(map(torch.equal, gradients, (p.grad for p in model.parameters()))))

    with LocalFedDyn(model, alpha=5.0):
        for x in batches(3):
            optimizer.register_step_post_hook(look)
            optimizer.zero_grad()
            loss(model, x).backward()
            gradients[:] = [p.grad.clone() for p in model.parameters()]
            optimizer.step()
    assert groups == [(1, 0.5)] * 6
    assert all(same)
    assert round_progress(model).steps == 3


def test_other_optimizers_get_their_closure_itself():
    build(clip=0.5)
    seen = []

    class Curious(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(closure)

    def closure():
        return None

    Curious([nn.Parameter(torch.ones(2))], lr=1.0).step(closure)
    assert seen == [closure]
