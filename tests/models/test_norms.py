"""``variance="auto"``: He's rule where no norm layer follows, the kind's own elsewhere."""

import copy

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.models.norms import first_norm

HE = 2.0
TORCH = 1 / 3


class RMSNorm(nn.Module):
    """As transformers models have their own."""


class LlamaRMSNorm(RMSNorm):
    """The same."""


class Normalize(nn.Module):
    """Of inputs, as in torchvision."""


class NormFreeBlock(nn.Module):
    """As in timm."""


def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64), *more
    )


def times_fan_in(model):
    return {
        name: layer.plans["weight"].variance * torch.Size(layer.weight.shape[1:]).numel()
        for name, layer in model.named_modules()
        if hasattr(layer, "plans")
    }


@pytest.mark.parametrize(
    "norm",
    [
        *(nn.BatchNorm1d(64), nn.LayerNorm(64), nn.GroupNorm(4, 64), nn.InstanceNorm1d(64)),
        *(RMSNorm(), LlamaRMSNorm(), nn.SyncBatchNorm(64)),
        nn.Sequential(nn.ModuleList([nn.LayerNorm(4)])),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norm_layers_leave_torch_s_variance_to_all(norm):
    model = net(copy.deepcopy(norm))
    assert first_norm(model).startswith("4")
    found = times_fan_in(fedpara.convert(model, gamma=0.1, variance="auto"))
    assert set(found) == {"0", "3"}
    assert all(value == pytest.approx(TORCH) for value in found.values())


@pytest.mark.parametrize(
    "other",
    [
        *(nn.Identity(), nn.LocalResponseNorm(2), Normalize(), NormFreeBlock()),
        *(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),),
        *(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)),),
    ],
    ids=lambda other: type(other).__name__,
)
def test_without_any_it_is_he_s(other):
    model = net(copy.deepcopy(other))
    assert first_norm(model) is None
    found = times_fan_in(fedpara.convert(model, gamma=0.1, variance="auto", include="0,3"))
    assert all(value == pytest.approx(HE) for value in found.values())


@pytest.mark.parametrize("init", ["auto", "random", "seeded"])
@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_the_weights_drawn_are_those_of_he_bit_for_bit(method, init):
    torch.manual_seed(1)
    auto = fedpara.convert(net(), method=method, gamma=0.3, variance="auto", init=init)
    torch.manual_seed(1)
    he = fedpara.convert(net(), method=method, gamma=0.3, variance="he", init=init)
    for mine, theirs in zip(auto.state_dict().values(), he.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert float(auto[3].weight.detach().var() * 32 * 16) == pytest.approx(HE, rel=0.1)


def test_weights_with_a_start_of_their_own_keep_it():
    starts = {0: 0.002, 3: 0.0}
    models = []
    for variance in ("auto", "torch"):
        model = net(nn.ReLU(), nn.Linear(64, 64))
        for place, std in starts.items():
            nn.init.normal_(model[place].weight, std=std)
        model = fedpara.convert(model, gamma=0.3, variance=variance)
        assert float(model[0].weight.detach().std()) == pytest.approx(0.002, rel=0.02)
        assert not model[3].weight.any()
        models.append(model)
    auto, torchs = models
    for place in starts:
        assert auto[place].plans == torchs[place].plans
    assert times_fan_in(auto)["5"] == pytest.approx(HE)


def test_user_s_he_start_stays_what_it_is():
    model = net()
    nn.init.kaiming_normal_(model[3].weight)
    fedpara.convert(model, gamma=0.3, variance="auto")
    assert float(model[3].weight.detach().std()) == pytest.approx((2 / 512) ** 0.5, rel=0.05)


def test_kinds_that_are_no_sums_before_a_relu_keep_theirs():
    model = nn.ModuleDict(
        {
            "table": nn.Embedding(200, 48),
            "lstm": nn.LSTM(48, 40),
            "attention": nn.MultiheadAttention(40, 4),
            "head": nn.Linear(40, 200),
        }
    )
    fedpara.convert(model, gamma=0.1, variance="auto")
    assert model["table"].plans["weight"].variance == 1.0
    assert model["lstm"].plans["weight_ih_l0"].variance == pytest.approx(1 / (3 * 40))
    assert model["head"].plans["weight"].variance == pytest.approx(HE / 40)
    for plan in model["attention"].plans.values():
        assert plan.variance < 1 / 40


def test_layers_may_say_otherwise():
    options = {"overrides": "3: variance=torch", "variance": "auto"}
    found = times_fan_in(fedpara.convert(net(), gamma=0.1, **options))
    assert found == {"0": pytest.approx(HE), "3": pytest.approx(TORCH)}


@pytest.mark.filterwarnings("ignore:init='fit'")
def test_updates_of_frozen_weights_and_fits_are_left_alone():
    frozen = fedpara.convert(net(), gamma=0.1, variance="auto", base="frozen")
    assert all(value == pytest.approx(TORCH) for value in times_fan_in(frozen).values())
    fitted = [
        times_fan_in(fedpara.convert(net(), rank=20, variance=rule, init="fit", include="3"))
        for rule in ("auto", "torch")
    ]
    assert fitted[0] == fitted[1]


def test_a_server_and_its_clients_decide_alike():
    mine, theirs = (
        fedpara.ModelSpec.of(fedpara.convert(net(), gamma=0.1, variance="auto")) for _ in range(2)
    )
    mine.check_equal(theirs, here="here", there="there")
