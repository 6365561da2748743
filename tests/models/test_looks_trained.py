"""What becomes of weights that the model already has is never silent."""

import warnings

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError
from fedpara_plugins.models import conversion


def trained():
    """A net whose weights have the few strong directions that training gives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 48, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 64))
    with torch.no_grad():
        for parameter in (model[0].weight, model[3].weight):
            rows = parameter.flatten(1)
            u, v = torch.randn(rows.shape[0], 4), torch.randn(4, rows.shape[1])
            parameter.add_((u @ v).view_as(parameter) * parameter.std())
    return model


@pytest.mark.parametrize(
    "fresh",
    [
        lambda w: None,
        nn.init.kaiming_normal_,
        nn.init.xavier_uniform_,
        lambda w: nn.init.normal_(w, std=0.02),
        nn.init.zeros_,
    ],
)
def test_freshly_drawn_weights_convert_without_a_warning(fresh):
    model = nn.Sequential(nn.Linear(100, 120), nn.Conv2d(32, 48, 3))
    for layer in model:
        fresh(layer.weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fedpara.convert(model, method="fedpara", gamma=0.3)


CHOICES = r"base='frozen'.*init='fit'.*trained='discard'"


@pytest.mark.parametrize(
    "options",
    [{"init": "random"}, {"init": "seeded"}, {"base": "factors"}, {"local": "dense"}],
    ids=str,
)
def test_trained_weights_are_not_replaced_in_silence(options):
    dense = trained()
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"'0\.weight': its largest.*{CHOICES}"):
        fedpara.convert(dense, method="fedpara", **options)
    assert [type(layer) for layer in dense[:1]] == [nn.Conv2d]
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())
    fedpara.convert(dense, method="fedpara", trained="discard", **options)
    assert "0.weight_base" not in dense.state_dict()


def test_trained_weights_stay_unless_options_say_otherwise(caplog):
    dense = trained()
    x = torch.randn(4, 16, 6, 6)
    expected, weight = dense(x), dense[0].weight.detach().clone()
    conversion._notes_told.clear()
    with caplog.at_level("INFO", logger="fedpara"):
        model = fedpara.convert(dense, method="fedpara")
    assert torch.equal(model(x), expected)
    assert torch.equal(model[0].weight_base, weight)
    assert fedpara.models.config_of(model).base == "frozen"
    assert "'0.weight': its largest singular value is" in caplog.text


def test_options_of_the_residual_form_are_refused_for_fresh_weights():
    for options in ({"train": "right"}, {"trainable": "none"}, {"core": False}):
        with pytest.raises(ConfigError, match=rf"{next(iter(options))}'.*base='frozen'"):
            fedpara.convert(nn.Linear(64, 64), method="fedpara", **options)
        fedpara.convert(nn.Linear(64, 64), method="fedpara", base="frozen", **options)


def test_a_frozen_body_that_is_trained_does_not_decide_about_a_fresh_head():
    body = trained()[:2].requires_grad_(False)
    model = fedpara.convert(nn.Sequential(body, nn.Linear(64, 64)), method="fedpara")
    assert "1.weight_base" not in model.state_dict()


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_fit_gives_close_factors_and_says_how_close(method):
    dense = trained()
    weights = {"0": dense[0].weight.detach().clone(), "3": dense[3].weight.detach().clone()}
    model = fedpara.convert(dense, method=method, gamma=0.5, init="fit")
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        error = ((layer.weight - weight).norm() / weight.norm()).item()
        assert layer.fit_errors["weight"] == pytest.approx(error, rel=1e-3)
        assert f"{error:.3f}" in str(fedpara.report(model))
        # The best matrix of the same rank, by SVD, is what any fit has to reach.
        if layer.plans["weight"].kernel:
            continue
        singular = torch.linalg.svdvals(weight)
        best = (singular[layer.plans["weight"].rank :].norm() / singular.norm()).item()
        assert error <= best * 1.001


def test_fit_of_an_exact_composition_is_found():
    torch.manual_seed(0)
    layer = nn.Linear(60, 50)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(50, 6) @ torch.randn(6, 60))
    assert fedpara.convert(layer, method="fedpara", rank=8, init="fit").fit_errors["weight"] < 1e-3
