"""`composed_once`: the same numbers as without, never a stale weight, no gradient lost."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import fedpara_plugins as fedpara
from fedpara_plugins import ConversionError, JacobianCorrection, composed_once
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.training.step_hooks import shared_phase


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 24)
        self.lstm = nn.LSTM(24, 32, batch_first=True)
        self.conv = nn.Conv1d(32, 40, 3)
        self.head = nn.Linear(40, 48)

    def forward(self, tokens):
        hidden = self.lstm(self.embed(tokens))[0].transpose(1, 2)
        return self.head(self.conv(hidden).relu().mean(2))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return fedpara.convert(Net(), method="pfedpara", gamma=0.3, min_size=0)


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.randint(0, 60, (3, 7)) for _ in range(4)]


@pytest.fixture
def composed(monkeypatch):
    """How often a weight was composed."""
    calls, compose = [], WeightPlan.compose
    monkeypatch.setattr(WeightPlan, "compose", lambda *a: calls.append(1) or compose(*a))
    return calls


def same(model, inputs):
    """Against a copy, which composes for itself."""
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), copy.deepcopy(model)(inputs))


def test_evaluation_composes_each_weight_once(model, batches, composed):
    model.eval()
    with torch.no_grad():
        expected = [model(batch) for batch in batches]
        composed.clear()
        with composed_once(model):
            got = [model(batch) for batch in batches]
    assert len(composed) == 5
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_accumulated_gradients_and_one_composition(model, batches, composed):
    for batch in batches:
        model(batch).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    composed.clear()
    with composed_once(model):
        for batch in batches:
            model(batch).square().sum().backward()
        assert model.head.x1.grad is None
    assert len(composed) == 5
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def test_a_backward_pass_after_the_context_loses_nothing(model, batches):
    (model(batches[0]).sum() + model(batches[1]).square().sum()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with composed_once(model):
        model(batches[0]).sum().backward()
        later = model(batches[1]).square().sum()
    later.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


def edit(model):
    with torch.no_grad():
        model.head.x1.mul_(2)


def step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def load(model):
    model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()})


def replace(model):
    model.head.x1 = nn.Parameter(model.head.x1.detach() * 3)


@pytest.mark.parametrize("change", [edit, step, load, replace])
def test_changed_factors_are_composed_anew(model, batches, change):
    model.eval()
    with composed_once(model), torch.no_grad():
        before = model(batches[0])
        with torch.enable_grad():
            change(model)
        assert not torch.allclose(model(batches[0]), before)
        same(model, batches[0])


def through_data(model):
    model.head.x1.data.mul_(2)


def through_numpy(model):
    view = model.head.x1.detach().numpy()
    view *= 2


@pytest.mark.parametrize("change", [edit, step, load, replace, through_data, through_numpy])
def test_outside_the_context_no_change_is_missed(model, batches, change):
    model.eval()
    with torch.no_grad(), composed_once(model):
        before = model(batches[0])
    change(model)
    with torch.no_grad():
        assert not torch.allclose(model(batches[0]), before)
    same(model, batches[0])


def test_other_tensors_in_the_place_of_the_factors(model, batches):
    other = {k: v.detach() * 1.5 for k, v in model.named_parameters()}
    with torch.no_grad():
        expected = functional_call(model, other, (batches[0],))
        with composed_once(model):
            model(batches[0])
            torch.testing.assert_close(functional_call(model, other, (batches[0],)), expected)
            same(model, batches[0])
    single = torch.func.grad(lambda p: functional_call(model, p, (batches[0],)).sum())
    with composed_once(model):
        got = single(other)
    torch.testing.assert_close(got["head.x1"], single(other)["head.x1"])


@pytest.mark.filterwarnings("ignore")
def test_a_trace_holds_the_factors_and_no_weight():
    layer = fedpara.convert(nn.Linear(24, 32), method="fedpara", rank=2, min_size=0)
    x = torch.randn(3, 24)
    with torch.no_grad(), composed_once(layer):
        layer(x)
        traced = torch.jit.trace(layer, x, check_trace=False)
    with torch.no_grad():
        layer.x1.mul_(2)
        torch.testing.assert_close(traced(x), layer(x))


def test_copies_compose_for_themselves(model, batches):
    with composed_once(model), torch.no_grad():
        before = model(batches[0])
        other = copy.deepcopy(model)
        through_data(other)
        assert not torch.allclose(other(batches[0]), before)
        torch.testing.assert_close(model(batches[0]), before)


def test_training_and_evaluation_modes_autocast_and_inference_do_not_mix(model, batches):
    with composed_once(model):
        with torch.inference_mode():
            model(batches[0])
        with torch.no_grad():
            plain = model(batches[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model.head(torch.randn(2, 40)).dtype == torch.bfloat16
        loss = model(batches[0]).sum()
        loss.backward()
        torch.testing.assert_close(model(batches[0]), plain)
    assert model.head.x1.grad is not None


def test_phases_of_training_do_not_mix(batches):
    options = {"method": "pfedpara", "gamma": 0.3, "min_size": 0, "schedule": "decoupled"}
    model = fedpara.convert(Net(), **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)  # private halves that are not zero
    with composed_once(model), torch.no_grad():
        joint = model(batches[0])
        with shared_phase(model):
            shared = model(batches[0])
            assert not torch.allclose(shared, joint)
            torch.testing.assert_close(shared, copy.deepcopy(model)(batches[0]))
            torch.testing.assert_close(model.eval()(batches[0]), joint)
        torch.testing.assert_close(model.train()(batches[0]), joint)


def test_gradients_enabled_in_inference_mode_leave_nothing_for_outside(model, batches):
    with composed_once(model):
        with torch.inference_mode(), torch.enable_grad():
            model(batches[0])
        model(batches[0]).sum().backward()
    assert model.head.x1.grad is not None


def test_a_kept_weight_is_as_the_parameter_it_stands_for_under_autocast(model):
    x, dense = torch.randn(2, 40), fedpara.to_dense(model.head)
    with torch.no_grad(), composed_once(model), torch.autocast("cpu", torch.bfloat16):
        assert model.head.weight.dtype == torch.float32
        torch.testing.assert_close(model.head(x), dense(x), rtol=0, atol=0)


def test_a_step_inside_is_refused_while_gradients_wait(model, batches):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with composed_once(model):
        model(batches[0]).sum().backward()
        with pytest.raises(ConversionError, match="after it"):
            optimizer.step()
    optimizer.step()


def test_factors_changed_while_gradients_wait(model, batches):
    def train():
        with composed_once(model):
            model(batches[0]).sum().backward()
            edit(model)

    with pytest.raises(ConversionError, match="outside of it"):
        train()
    model(batches[0]).sum().backward()  # nothing of the context is left


def test_an_error_inside_gives_no_gradients(model, batches):
    def train():
        with composed_once(model):
            model(batches[0]).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        train()
    assert model.head.x1.grad is None


def test_other_threads_compose_for_themselves(model, batches, composed):
    @torch.no_grad()  # of this thread alone
    def evaluate():
        model(batches[0])

    with composed_once(model):
        evaluate()
        composed.clear()
        evaluate()
        assert not composed
        thread = threading.Thread(target=evaluate)
        thread.start()
        thread.join()
        assert composed


def test_with_the_jacobian_correction(model, batches):
    correction = JacobianCorrection(model, lr=0.1)
    with correction:
        expected = correction(model(batches[0]).square().mean())
    with composed_once(model), correction:
        got = correction(model(batches[0]).square().mean())
    torch.testing.assert_close(got, expected)


def test_a_model_without_factors():
    model = nn.Linear(3, 3)
    with composed_once(model):
        model(torch.ones(1, 3)).sum().backward()
    assert model.weight.grad is not None


def linear():
    torch.manual_seed(0)
    return fedpara.convert(nn.Sequential(nn.Linear(40, 48)), method="fedpara", gamma=0.2)


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_stays_behind(backward):
    model, held = linear(), []
    with composed_once(model):
        output = model(torch.randn(300, 40)).sum()
        held += [weakref.ref(model[0].weight)]
        if backward:
            output.backward()
    del output
    gc.collect()
    assert held[0]() is None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad])
def test_a_fused_step_is_noticed(optimizer):
    """It leaves the factors' versions as they were."""
    model, x = linear(), torch.randn(3, 40)
    step = optimizer(model.parameters(), lr=0.1, fused=True).step
    model(x).square().sum().backward()
    with composed_once(model), torch.no_grad():
        before = model(x)
        step()
        after = model(x)
        assert not torch.allclose(before, after)
        same(model, x)


def test_another_dtype_inside(model, batches):
    with composed_once(model), torch.no_grad():
        model(batches[0])
        model.double()
        assert model(batches[0]).dtype == torch.float64
        same(model, batches[0])
        model.bfloat16().float()  # rounds
        same(model, batches[0])


def test_unfrozen_inside():
    model, x = linear(), torch.randn(3, 40)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()))
    model.requires_grad_(False)
    model[0].bias.requires_grad_(True)
    with composed_once(model):
        model(x).sum().backward()
        model.requires_grad_(True)
        model[0].bias.grad = None
        model(x).sum().backward()
    got = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(got, list(expected))


def test_frozen_inside_while_gradients_wait():
    model, x = linear(), torch.randn(3, 40)

    def train():
        with composed_once(model):
            model(x).sum().backward()
            model.requires_grad_(False)

    with pytest.raises(ConversionError, match="changed or frozen"):
        train()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside(reentrant):
    model, x = linear(), torch.randn(3, 40, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with composed_once(model):
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    got = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(got, list(expected))


def test_one_context_is_not_opened_twice():
    model = linear()
    with composed_once(model) as once, pytest.raises(ConversionError, match="open already"), once:
        pass
