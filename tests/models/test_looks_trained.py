"""What becomes of weights that the model already has is never silent."""

import warnings

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara


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


def test_trained_weights_warn_and_the_warning_names_both_choices():
    with pytest.warns(UserWarning, match=r"0\.weight.*init='fit'.*init='random'"):
        fedpara.convert(trained(), method="fedpara")
    for choice in ("random", "fit"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fedpara.convert(trained(), method="fedpara", init=choice)
        assert not [w for w in caught if "looks trained" in str(w.message)]


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
