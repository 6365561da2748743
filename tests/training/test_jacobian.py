"""The Jacobian correction against the paper's formulas, written out by hand."""

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConversionError, JacobianCorrection


def by_hand(layer, jacobian, lr):
    """Section 3: J_W1 = J_W * W2, J_X1 = J_W1 Y1, J_Y1 = J_W1^T X1; 1 and 2 swapped likewise."""
    s = layer.plans["weight"].scale
    x1, y1, x2, y2 = layer.x1, layer.y1, layer.x2, layer.y2
    w1, w2 = x1 @ y1.T, x2 @ y2.T
    j1, j2 = s * jacobian * w2, s * jacobian * w1
    moved1 = (x1 - lr * j1 @ y1) @ (y1 - lr * j1.T @ x1).T
    moved2 = (x2 - lr * j2 @ y2) @ (y2 - lr * j2.T @ x2).T
    return (s * moved1 * moved2 - (s * w1 * w2 - lr * jacobian)).square().sum()


def test_equals_the_formulas_and_has_their_gradient():
    torch.manual_seed(0)
    layer = fedpara.convert(nn.Linear(40, 36), gamma=0.5, min_size=0).double()
    x = torch.randn(7, 40, dtype=torch.float64)
    lr, weight = 0.3, 10.0
    correction = JacobianCorrection(layer, lr=lr, weight=weight)
    with correction:
        loss = layer(x).tanh().square().mean()
    term = correction(loss)
    got = torch.autograd.grad(term, [layer.x1, layer.y2])

    dense = layer.weight.detach().requires_grad_()
    plain = nn.functional.linear(x, dense, layer.bias.detach()).tanh().square().mean()
    (jacobian,) = torch.autograd.grad(plain, dense)
    expected = 0.5 * weight * by_hand(layer, jacobian, lr)
    torch.testing.assert_close(term, expected)
    for mine, theirs in zip(got, torch.autograd.grad(expected, [layer.x1, layer.y2]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_adds_up_over_layers_and_repeated_use():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(24, 24, 3, padding=1))
    model = fedpara.convert(model, method="fedpara", gamma=0.3)
    x = torch.randn(2, 8, 5, 5)
    correction = JacobianCorrection(model, lr=0.1)
    with correction:
        hidden = model(x)
        loss = model[1](hidden).square().mean()
    once = correction(loss)
    assert once > 0
    loss_and_term = loss + once
    loss_and_term.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_leaves_no_trace_on_the_model():
    model = fedpara.convert(nn.Linear(64, 64), method="fedpara")
    before = set(vars(model))
    with JacobianCorrection(model, lr=0.1):
        model(torch.randn(2, 64))
    assert set(vars(model)) == before


def test_needs_a_factorised_layer():
    with pytest.raises(ConversionError, match=r"convert\(\)"):
        JacobianCorrection(nn.Linear(4, 4), lr=0.1)
