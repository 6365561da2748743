"""When observers of steps are called: once for each gradient that is used, and once at the end."""

import threading

import pytest
import torch
from torch import nn

from fedpara_plugins.training import StepObserver, observe_real_steps


class Log:
    """An observer that notes its calls, of one optimizer and those around or in it."""

    def __init__(self):
        self.calls = []
        self.kept = []

    def observer(self):
        return StepObserver(ready=self.ready, end=self.end, begin=self.begin)

    def begin(self, step):
        self.calls.append("begin")

    def ready(self, step):
        self.calls.append(f"ready {step.evaluations}")
        self.kept.append([p.grad.item() for p in step.optimizer.param_groups[0]["params"]])

    def end(self, step):
        self.calls.append("end" if step.completed else "failed")


@pytest.fixture
def log():
    found = Log()
    with observe_real_steps(found.observer()):
        yield found


def one(kind=torch.optim.SGD, **options):
    parameter = nn.Parameter(torch.ones(()))
    parameter.grad = torch.ones(())
    return parameter, kind([parameter], lr=0.1, **options)


def closing(optimizer, parameter, gradients):
    values = iter(gradients)

    def closure():
        value = next(values)
        if isinstance(value, BaseException):
            raise value
        parameter.grad = torch.tensor(float(value))
        return value

    return closure


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        closure()
        value = closure()
        super().step()
        return value


class Handing(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


class Named(torch.optim.SGD):
    def step(self, other=None, closure=None):
        return closure()


class Around(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.base = torch.optim.SGD(self.param_groups, lr=lr)

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        self.base.step()


def parents_first():
    """Torch puts hooks around the step of a class that has been used."""
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)


def test_a_plain_step(log):
    _, optimizer = one()
    optimizer.step()
    assert log.calls == ["begin", "ready 1", "end"]


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_gives_the_gradient(log, by_name):
    parameter, optimizer = one()
    closure = closing(optimizer, parameter, [5])
    value = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
    assert value == 5
    assert log.calls == ["begin", "ready 1", "end"]
    assert log.kept == [[5.0]]


def test_two_closures_and_a_parents_step(log):
    parents_first()
    parameter, optimizer = one(Twice)
    assert optimizer.step(closing(optimizer, parameter, [5, 6])) == 6
    assert log.calls == ["begin", "ready 1", "ready 2", "end"]
    assert log.kept == [[5.0], [6.0]]


def test_a_closure_that_is_handed_on(log):
    parents_first()
    parameter, optimizer = one(Handing)
    assert optimizer.step(closing(optimizer, parameter, [5])) == 5
    optimizer.step()
    assert log.calls == ["begin", "ready 1", "end"] * 2


def test_other_arguments_stay_in_their_places(log):
    parameter, optimizer = one(Named)
    assert optimizer.step("other", closure=closing(optimizer, parameter, [5])) == 5
    assert log.calls == ["begin", "ready 1", "end"]


def test_an_optimizer_around_another_counts_for_the_other(log):
    parents_first()
    parameter, optimizer = one(Around)
    optimizer.step(closing(optimizer, parameter, [5]))
    assert log.calls == ["begin", "ready 1", "end"]
    assert log.kept == [[5.0]]


def test_lbfgs_and_each_of_its_gradients(log):
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.LBFGS([parameter], lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        value = parameter.square()
        value.backward()
        return value

    optimizer.step(closure)
    assert log.calls == ["begin", "ready 1", "ready 2", "ready 3", "end"]


@pytest.mark.parametrize("place", [0, 1])
def test_an_error_in_a_closure_ends_the_step_at_once(log, place):
    parameter, optimizer = one(Twice)
    gradients = [5, 6]
    gradients[place] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closing(optimizer, parameter, gradients))
    assert log.calls == ["begin", *(["ready 1"] if place else []), "failed"]
    log.calls.clear()
    optimizer.step(closing(optimizer, parameter, [5, 6]))
    assert log.calls == ["begin", "ready 1", "ready 2", "end"]


def test_an_error_elsewhere_ends_the_step_at_the_next_one(log):
    class Failing(torch.optim.SGD):
        fails = True

        def step(self, closure=None):
            if self.fails:
                raise ValueError

    _, optimizer = one(Failing)
    with pytest.raises(ValueError):
        optimizer.step()
    assert log.calls == ["begin", "ready 1"]
    optimizer.fails = False
    optimizer.step()
    assert log.calls == ["begin", "ready 1", "failed", "begin", "ready 1", "end"]


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_s_step_is_unscaled_on_demand_or_not_made(fused):
    seen = []

    def ready(step):
        step.unscale()
        step.unscale()
        assert step.scaler is scaler
        seen.append(parameter.grad.item())

    parameter, optimizer = one(fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with observe_real_steps(StepObserver(ready=ready, end=lambda step: seen.append("end"))):
        for overflows in (False, True):
            optimizer.zero_grad()
            scaler.scale(3 * parameter).backward()
            if overflows:
                parameter.grad.fill_(torch.inf)
            scaler.step(optimizer)
            scaler.update()
    assert seen == [3.0, "end"]
    assert parameter.item() == pytest.approx(1 - 0.1 * 3)


class Asking(torch.optim.SGD):
    """An optimizer that asks the scaler, as GradScaler's contract allows it."""

    _step_supports_amp_scaling = True

    def step(self, closure=None, grad_scaler=None):
        if grad_scaler is None:
            return super().step(closure)
        grad_scaler.unscale_(self)
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        if all(bool(torch.isfinite(g).all()) for g in gradients):
            return super().step()
        return None


@pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")
@pytest.mark.parametrize("by_user", [False, True])
def test_an_optimizer_that_asks_the_scaler_finds_unscaled_gradients(by_user):
    """Those that overflow are skipped, and the scaler goes down as ever."""
    seen = []
    parameter, optimizer = one(Asking)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ready = StepObserver(
        ready=lambda step: seen.append(parameter.grad.item()), end=lambda step: seen.append("end")
    )
    with observe_real_steps(ready):
        for overflows in (False, True, False):
            optimizer.zero_grad()
            scaler.scale(3 * parameter).backward()
            if overflows:
                parameter.grad.fill_(torch.inf)
            if by_user:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert seen == [3.0, "end"] * 2
    assert parameter.item() == pytest.approx(1 - 2 * 0.1 * 3)
    assert scaler.get_scale() == 512.0


def test_observers_of_other_optimizers_do_not_touch_them():
    """Not even the closure, which some optimizers look at."""
    seen = []

    class Curious(torch.optim.SGD):
        def step(self, closure=None):
            seen.append(closure)

    never = StepObserver(ready=seen.append, end=seen.append, concerns=lambda optimizer: False)
    _, optimizer = one(Curious)
    with observe_real_steps(never):
        optimizer.step(len)
    assert seen == [len]


def test_observers_come_in_order_and_go():
    seen = []

    def named(name):
        return StepObserver(ready=lambda step: seen.append(name), end=lambda step: None)

    _, optimizer = one()
    with observe_real_steps(named("first")):
        with observe_real_steps(named("second")):
            optimizer.step()
        optimizer.step()
    optimizer.step()
    assert seen == ["first", "second", "first"]


def test_an_observer_that_goes_amid_a_step_in_another_thread_sees_its_end():
    seen = []
    inside, go_on = threading.Event(), threading.Event()

    class Waiting(torch.optim.SGD):
        def step(self, closure=None):
            inside.set()
            go_on.wait(20)

    _, optimizer = one(Waiting)
    observer = StepObserver(ready=lambda s: seen.append("ready"), end=lambda s: seen.append("end"))
    thread = threading.Thread(target=optimizer.step)
    with observe_real_steps(observer):
        thread.start()
        inside.wait(20)
    go_on.set()
    thread.join()
    assert seen == ["ready", "end"]
