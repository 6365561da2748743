"""More of Lightning, Hugging Face and schedule-free than the cells have."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
import transformers
from accelerate import Accelerator
from torch import Tensor, nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import LocalScaffold
from fedpara_plugins.training import round_progress, start_round
from harness.loops.apps import InOrder, LightningNet, TransformersNet, lightning_fit
from harness.oracles.plain_steps import (
    PlainNet,
    PlainOptions,
    batches,
    distance,
    loss_of,
    plain_steps,
)

LR = 0.01
NEAR = 1e-6
ALL = {"clip": 0.5, "decay": "composed", "schedule": "decoupled", "private_steps": 2}
PLAIN = PlainOptions(clip=0.5, decay=0.5, private_steps=2)


def build(method: str = "pfedpara", **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 40))
    return fedpara.convert(model, method=method, gamma=0.5, **options).double()


def drawn(count: int) -> list[Tensor]:
    return [x.double() for x in batches(count)]


def sgd(parameters: Any, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=decay)


def fit(net: LightningNet, folder: Path, count: int, **options: Any) -> None:
    lightning_fit(net, drawn(count), folder, **options)


def pairs(count: int) -> list[list[Tensor]]:
    some = drawn(count)
    return [some[place : place + 2] for place in range(0, count, 2)]


def test_lightning_with_all_options_and_accumulation(tmp_path: Path) -> None:
    model = build(**ALL)
    wanted = plain_steps(PlainNet(model, "pfedpara"), sgd, pairs(10), PLAIN)
    net = LightningNet(model, lambda m: sgd(m.parameters(), 0.5))
    fit(net, tmp_path, 10, accumulate_grad_batches=2)
    assert distance(model, wanted) < NEAR
    progress = round_progress(model)
    assert progress is not None
    assert progress.steps == 5


def test_lightnings_own_clipping_comes_before_the_option(tmp_path: Path) -> None:
    model = build(clip=0.5)
    wanted = plain_steps(PlainNet(model, "pfedpara"), sgd, pairs(2), PlainOptions(clip=0.1))
    fit(LightningNet(model, lambda m: sgd(m.parameters())), tmp_path, 2,
        gradient_clip_val=0.1, accumulate_grad_batches=2)  # fmt: skip
    assert distance(model, wanted) < 1e-4  # both rules add 1e-6 to the norm


class Manual(LightningNet):
    """Two optimizers on one backward pass, the second of dense parameters alone."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> None:
        both: Any = self.optimizers()
        for one in both:
            one.zero_grad()
        self.manual_backward(loss_of(self.model(batch)))
        for one in both:
            one.step()


def split(model: nn.Module) -> list[torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    biases = [p for name, p in named.items() if name.endswith("bias")]
    factors = [p for name, p in named.items() if not name.endswith("bias")]
    return [sgd(factors, 0.5), sgd(biases, 0.5)]


def test_lightning_with_two_optimizers(tmp_path: Path) -> None:
    model = build(**ALL)
    wanted = plain_steps(PlainNet(model, "pfedpara"), sgd, [[x] for x in drawn(5)], PLAIN)
    fit(Manual(model, split), tmp_path, 5)
    assert distance(model, wanted) < NEAR
    progress = round_progress(model)
    assert progress is not None
    assert progress.steps == 5


def lbfgs(parameters: Any) -> torch.optim.LBFGS:
    return torch.optim.LBFGS(parameters, lr=0.05, max_iter=6)


@pytest.mark.parametrize("bound", [None, 2.0])
def test_lightning_with_lbfgs(bound: float | None, tmp_path: Path) -> None:
    model = build(clip=bound)
    net = PlainNet(model, "pfedpara")
    values = list(net.values.values())
    plain = lbfgs(values)
    for x in drawn(3):

        def closure(x: Tensor = x) -> Tensor:
            plain.zero_grad()
            loss = net.loss(x)
            loss.backward()
            if bound is not None:
                nn.utils.clip_grad_norm_(values, bound)
            return loss

        plain.step(closure)  # type: ignore[no-untyped-call,arg-type]
    fit(LightningNet(model, lambda m: lbfgs(m.parameters())), tmp_path, 3)
    assert distance(model, net) < NEAR


def test_transformers_with_all_options_accumulation_and_its_own_optimizer(tmp_path: Path) -> None:
    """The trainer makes two groups, one without decay: biases."""
    options = PlainOptions(clip=0.5, private_steps=2, decay=0.5, decoupled=True)
    model = build(**ALL)

    class Net(PlainNet):
        """Decays no biases, as the trainer has it."""

        def factors_together(self, name: str) -> float:  # type: ignore[override]
            return torch.inf if name.endswith("bias") else super().factors_together(name)

    def adamw(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)

    wanted = plain_steps(Net(model, "pfedpara"), adamw, pairs(10), options)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=1,
        gradient_accumulation_steps=2,
        learning_rate=LR,
        weight_decay=0.5,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        optim="adamw_torch",
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    InOrder(
        model=TransformersNet(model), args=arguments, train_dataset=[{"x": x} for x in drawn(10)]
    ).train()
    assert distance(model, wanted) < 1e-5
    progress = round_progress(model)
    assert progress is not None
    assert progress.steps == 5


# Schedule-free


def test_schedule_free_adamw_decays_composed_weights_as_dense_ones() -> None:
    """With zero gradients only the decay is left: a dense weight shows what it does."""
    torch.manual_seed(0)
    for method in ("lowrank", "fedpara"):
        layer = fedpara.convert(nn.Linear(64, 64, bias=False), method=method, gamma=0.3).double()
        dense = nn.Parameter(layer.weight.detach().clone())
        for parameters in (list(layer.parameters()), [dense]):
            optimizer = schedulefree.AdamWScheduleFree(parameters, lr=0.001, weight_decay=0.5)
            optimizer.train()
            for _ in range(5):
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                optimizer.step()
        torch.testing.assert_close(layer.weight.detach(), dense.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_optimizers_with_all_options(name: str, foreach: bool, closure: bool) -> None:
    kind = getattr(schedulefree, name)

    def make(parameters: Any, decay: float = 0.0) -> Any:
        optimizer = kind(parameters, lr=LR, weight_decay=decay, foreach=foreach)
        optimizer.train()
        return optimizer

    model = build(clip=0.5, schedule="decoupled", private_steps=2)
    options = PlainOptions(clip=0.5, private_steps=2)
    wanted = plain_steps(PlainNet(model, "pfedpara"), make, [[x] for x in drawn(5)], options)
    optimizer = make(model.parameters())
    for x in drawn(5):

        def computed(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(x))
            loss.backward()
            return loss

        if closure:
            optimizer.step(computed)
        else:
            computed()
            optimizer.step()
    assert distance(model, wanted) < NEAR
    for state in (model, wanted):
        assert state is not None
    optimizer.eval()
    optimizer.train()
    assert distance(model, wanted) < NEAR


def test_the_schedule_free_wrapper_with_clip_and_decay() -> None:
    """It decays z, by the optimizer inside: there the option acts."""
    model = build(clip=0.5)
    net = PlainNet(model, "pfedpara")
    values = {name: value.detach().clone() for name, value in net.values.items()}
    z = {name: value.clone() for name, value in values.items()}
    for made, x in enumerate(drawn(5), start=1):
        for value in net.values.values():
            value.grad = None
        net.loss(x).backward()
        norm = torch.cat([v.grad.flatten() for v in net.values.values()]).norm()  # type: ignore[union-attr]
        with torch.no_grad():
            for name, value in net.values.items():
                share = 0.5 / net.factors_together(name)
                step = min(1.0, 0.5 / float(norm)) * value.grad + share * z[name]
                z[name] = z[name] - LR * step
                values[name] = values[name] + (z[name] - values[name]) / made
                value.copy_(0.1 * z[name] + 0.9 * values[name])
    optimizer = schedulefree.ScheduleFreeWrapper(
        torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.5)
    )
    optimizer.train()
    for x in drawn(5):
        optimizer.zero_grad()
        loss_of(model(x)).backward()
        optimizer.step()
    assert distance(model, net) < NEAR


class PlainWrapper:
    """The wrapper as its documentation has it, around SGD, for values that may have no gradient."""

    def __init__(self, values: list[Tensor], decay: float, decay_at_y: float, beta: float) -> None:
        self.param_groups = [{"params": values, "lr": LR}]
        self.decay, self.decay_at_y, self.beta = decay, decay_at_y, beta
        self.made = 0
        self.averages: dict[int, tuple[Tensor, Tensor]] = {}

    def zero_grad(self) -> None:
        for value in self.param_groups[0]["params"]:
            value.grad = None

    @torch.no_grad()
    def step(self) -> None:
        self.made += 1
        for y in self.param_groups[0]["params"]:
            if y.grad is None:
                continue
            z, x = self.averages.get(id(y), (y.clone(), y.clone()))
            z = z - LR * self.decay_at_y * y
            z = z - LR * (y.grad + self.decay * z)
            x = x + (z - x) / self.made
            self.averages[id(y)] = z, x
            y.copy_((1 - self.beta) * z + self.beta * x)


@pytest.mark.parametrize("decay_at_y", [0.0, 0.3])
@pytest.mark.parametrize("zeros", [False, True])
def test_the_schedule_free_wrapper_in_the_decoupled_schedule(
    zeros: bool, decay_at_y: float
) -> None:
    """Two rounds with one optimizer; gradients may be zeros where the model has none."""
    model = build(clip=0.5, schedule="decoupled", private_steps=2, decay="factors")
    net = PlainNet(model, "pfedpara")
    options = PlainOptions(clip=0.5, private_steps=2)
    plain = PlainWrapper(list(net.values.values()), 0.5, decay_at_y, 0.8)
    optimizer = schedulefree.ScheduleFreeWrapper(
        torch.optim.SGD(model.parameters(), lr=LR, weight_decay=0.5),
        momentum=0.8,
        weight_decay_at_y=decay_at_y,
    )
    optimizer.train()
    for _ in range(2):
        start_round(model)
        plain_steps(net, lambda _: plain, [[x] for x in drawn(5)], options)
        for x in drawn(5):
            optimizer.zero_grad(set_to_none=not zeros)
            loss_of(model(x)).backward()
            optimizer.step()
        assert distance(model, net) < NEAR
    optimizer.eval()
    with torch.no_grad():
        for value in net.values.values():
            value.copy_(plain.averages[id(value)][1])
    assert distance(model, net) < NEAR
    progress = round_progress(model)
    assert progress is not None
    assert progress.steps == 5


def test_the_schedule_free_wrapper_leaves_what_a_private_step_leaves_out_bit_by_bit() -> None:
    model = build(schedule="decoupled", private_steps=3).float()
    before = {
        n: p.detach().clone() for n, p in model.named_parameters() if n[-2:] not in ("x2", "y2")
    }
    base = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer = schedulefree.ScheduleFreeWrapper(base)
    optimizer.train()
    for x in drawn(3):
        optimizer.zero_grad()
        loss_of(model(x.float())).backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any("z" in base.state[after[name]] for name in before)


def test_the_reference_wrapper_does_as_for_parameters_without_gradients() -> None:
    model, by_hand = (
        build(**given) for given in ({"schedule": "decoupled", "private_steps": 2}, {})
    )
    net = PlainNet(by_hand, "pfedpara")
    made = []
    for values in (list(model.parameters()), list(net.values.values())):
        base = torch.optim.SGD(values, lr=LR)
        optimizer = schedulefree.ScheduleFreeWrapperReference(base)
        optimizer.train()
        made.append(optimizer)
    plain_steps(net, lambda _: made[1], [[x] for x in drawn(5)], PlainOptions(private_steps=2))
    for x in drawn(5):
        made[0].zero_grad()
        loss_of(model(x)).backward()
        made[0].step()
    assert distance(model, net) < NEAR


@pytest.mark.parametrize("name", ["ScheduleFreeWrapper", "ScheduleFreeWrapperReference"])
def test_scaffold_refuses_sgd_inside_of_the_wrappers(name: str) -> None:
    model = build()
    optimizer = getattr(schedulefree, name)(torch.optim.SGD(model.parameters(), lr=LR))
    optimizer.train()
    loss_of(model(drawn(1)[0])).backward()
    with pytest.raises(ConfigError, match=f"uses {name}"), LocalScaffold(model):
        optimizer.step()


def test_scaffold_trains_through_accelerate() -> None:
    model = build()
    optimizer: Any = Accelerator(cpu=True).prepare(torch.optim.SGD(model.parameters(), lr=LR))
    loss_of(model(drawn(1)[0])).backward()
    with LocalScaffold(model) as local:
        optimizer.step()
    assert local.result.steps == 1


def test_nothing_of_it_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fedpara_plugins"):
        fit(LightningNet(build(**ALL), lambda m: sgd(m.parameters(), 0.5)), tmp_path, 2)
    assert not [r for r in caplog.records if r.name.startswith("fedpara")]
