"""One decoded record of a reply against what was sent: dtypes, values, composed weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import MismatchError, ModelSpec, PayloadError
from fedpara_plugins.exchange.reply_checks import check_composed, in_sent_dtypes

INF, NAN = float("inf"), float("nan")


def answered(value, sent):
    return in_sent_dtypes({"w": value}, {"w": sent})["w"]


@pytest.mark.parametrize(
    ("value", "sent"),
    [
        (torch.ones(2).double(), torch.zeros(2)),
        (torch.ones(2).bfloat16(), torch.zeros(2)),
        (torch.ones(2), torch.zeros(2).half()),
        (torch.ones(2), torch.zeros(2, dtype=torch.int64)),
        (torch.ones(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)),
        (torch.ones(2, dtype=torch.uint64), torch.zeros(2, dtype=torch.int8)),
        (torch.ones(2, dtype=torch.int64), torch.zeros(2)),
        (torch.ones(2, dtype=torch.complex128), torch.zeros(2, dtype=torch.complex64)),
        (torch.ones(2).to(torch.float8_e5m2), torch.zeros(2).to(torch.float8_e5m2)),
        (torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)),
        (torch.ones(0), torch.zeros(0)),
    ],
)
def test_a_value_that_casts_arrives_in_the_dtype_that_was_sent(value, sent):
    found = answered(value, sent)
    assert found.dtype == sent.dtype
    assert torch.equal(found.to(torch.complex128), value.to(torch.complex128))


@pytest.mark.parametrize(
    ("value", "sent", "words"),
    [
        (torch.ones(2, dtype=torch.complex64), torch.zeros(2), "complex64"),
        (torch.ones(2).to(torch.float8_e5m2), torch.zeros(2), "float8"),
        (torch.ones(2), torch.zeros(2).to(torch.float8_e5m2), "float8"),
        (torch.ones(2, dtype=torch.bool), torch.zeros(2), "bool"),
        (torch.ones(2), torch.zeros(2, dtype=torch.bool), "bool"),
        (torch.full((2,), 1e300, dtype=torch.float64), torch.zeros(2), "infinite"),
        (torch.full((2,), 1e5), torch.zeros(2).half(), "infinite"),
        (torch.tensor([1.0, NAN]), torch.zeros(2), "holds 1 NaN"),
        (torch.tensor([1.0, INF]), torch.zeros(2), "holds 1 NaN"),
        (torch.tensor([1.0, NAN]), torch.zeros(2, dtype=torch.int64), "holds 1 NaN"),
        (torch.tensor([1.0, 1e30]), torch.zeros(2, dtype=torch.int64), "beyond the range"),
        (torch.tensor([300]), torch.zeros(1, dtype=torch.uint8), "beyond the range"),
        (torch.tensor([-1]), torch.zeros(1, dtype=torch.uint64), "beyond the range"),
        (torch.tensor([complex(1, NAN)]), torch.zeros(1, dtype=torch.complex64), "NaN"),
        (torch.tensor([NAN]).to(torch.float8_e5m2), torch.zeros(1).to(torch.float8_e5m2), "NaN"),
        (torch.ones(3), torch.zeros(2), "shape"),
        (torch.ones(1, 2), torch.zeros(2), "shape"),
    ],
)
def test_a_value_that_does_not_is_refused(value, sent, words):
    with pytest.raises(PayloadError, match=words):
        answered(value, sent)


def test_what_was_sent_as_infinite_may_stay_so_and_become_finite():
    mask = torch.tensor([0.0, -INF, NAN])
    assert torch.equal(answered(mask, mask)[:2], mask[:2])
    answered(torch.zeros(3), mask)
    for other in ([-INF, -INF, NAN], [0.0, INF, NAN], [0.0, NAN, NAN], [0.0, -INF, INF]):
        with pytest.raises(PayloadError, match="NaN"):
            answered(torch.tensor(other), mask)


def test_a_large_tensor_is_read_to_its_end():
    sent = torch.zeros(2**18 + 7)
    sent[0] = -INF
    last = sent.clone()
    last[-1] = INF
    answered(sent, sent)
    with pytest.raises(PayloadError, match="NaN"):
        answered(last, sent)


# Composed weights


def model(method, dtype=torch.float32, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 24, 3), nn.LSTM(24, 20), nn.Linear(20, 40))
    net = fedpara.convert(net, method=method, gamma=0.3, min_size=1, **options).to(dtype)
    spec = ModelSpec.of(net)
    state = {k: v.detach() for k, v in net.state_dict().items() if k in spec.shared_keys}
    return spec, state


CASES = [
    ("fedpara", torch.float32, {}),
    ("lowrank", torch.float32, {}),
    ("pfedpara", torch.float32, {}),
    ("fedpara", torch.float16, {}),
    ("fedpara", torch.bfloat16, {}),
    ("fedpara", torch.float32, {"tanh": True}),
]


@pytest.mark.parametrize(("method", "dtype", "options"), CASES)
def test_honest_factors_pass(method, dtype, options):
    spec, state = model(method, dtype, **options)
    check_composed(spec, state, state)
    check_composed(spec, {}, state)
    check_composed(spec, {k: v for k, v in state.items() if not k.endswith("x1")}, state)


@pytest.mark.parametrize(("method", "dtype", "options"), CASES[:5])
@pytest.mark.parametrize("weight", ["0.weight", "1.weight_hh_l0", "2.weight"])
def test_finite_factors_that_overflow_when_composed_are_refused(method, dtype, options, weight):
    """Exactly where composing the whole weight gives a value that is not finite."""
    spec, state = model(method, dtype, **options)
    keys = spec.factor_keys(weight)
    large = torch.finfo(dtype).max ** 0.5
    met = set()
    for factor in (1e-3, 1e-1, 1.0, 10.0, 100.0):
        forged = dict(state)
        for name in ("x1", "y1"):
            forged[keys[name]] = torch.full_like(state[keys[name]], min(large * factor, large**2))
            forged[keys[name]][:-1] = 0  # the last row alone overflows
        overflows = not torch.isfinite(spec.dense_state(forged)[weight]).all()
        met.add(overflows)
        if overflows:
            with pytest.raises(PayloadError, match=f"factors of '{weight}'"):
                check_composed(spec, forged, state)
            check_composed(spec, forged, forged)  # as it was sent
        else:
            check_composed(spec, forged, state)
    assert met == {True, False}


@pytest.mark.parametrize("options", [{}, {"tanh": True}])
@pytest.mark.parametrize(
    ("large", "small"),
    [(("x1",), ("y1", "x2", "y2")), (("x1", "y1"), ("x2", "y2")), (("x2", "y2"), ("x1", "y1"))],
)
def test_what_overflows_on_the_way_is_refused_though_the_product_is_small(large, small, options):
    """Found by fuzzing: the bound has to hold for every value on the way."""
    spec, state = model("fedpara", variance="torch", speed=0.5, **options)  # scales that overflow
    keys, draw = spec.factor_keys("2.weight"), torch.Generator().manual_seed(1)
    forged = dict(state)
    for names, size in ((large, 3e38), (small, 1e-37)):
        for name in names:
            signs = torch.randint(0, 2, state[keys[name]].shape, generator=draw) * 2.0 - 1
            forged[keys[name]] = size * signs
    overflows = not torch.isfinite(spec.dense_state(forged)["2.weight"]).all()
    if overflows:
        with pytest.raises(PayloadError, match=r"factors of '2\.weight'"):
            check_composed(spec, forged, state)
    else:
        check_composed(spec, forged, state)
    assert overflows or len(large) == 1


def test_most_replies_need_no_composing(monkeypatch):
    """A bound of the entries suffices for them."""
    spec, state = model("fedpara")
    monkeypatch.setattr("fedpara_plugins.exchange.reply_checks._blocks", None)
    check_composed(spec, state, state)
    check_composed(spec, {k: 1e4 * v for k, v in state.items()}, state)


def test_another_method_is_composed(monkeypatch):
    spec, state = model("fedpara")
    monkeypatch.setattr("fedpara_plugins.exchange.reply_checks.is_known", lambda method: False)
    check_composed(spec, state, state)
    forged = {**state, "2.x1": torch.full_like(state["2.x1"], 1e38)}
    forged["2.x2"] = forged["2.x1"]
    with pytest.raises(PayloadError, match=r"factors of '2.weight'"):
        check_composed(spec, forged, state)


def test_an_error_of_shapes_names_both(monkeypatch):
    with pytest.raises(MismatchError, match=r"\(3,\).*\(2,\)"):
        answered(torch.ones(3), torch.zeros(2))
