"""What may leave a client."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import MismatchError, ModelSpec, PayloadError
from fedpara_plugins.exchange.outgoing import check_names, select_outgoing, spec_among
from fedpara_plugins.exchange.records import plain_spec


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 4))
    return fedpara.convert(net, method="pfedpara", gamma=0.2, private="2.*", min_size=256)


MODEL = small()
SPEC, STATE = ModelSpec.of(MODEL), MODEL.state_dict()


@given(st.sets(st.sampled_from([*STATE, "note", "0.x2x", "other.0.x1"])), st.booleans())
def test_private_names_never_leave_whatever_else_is_there(names, side):
    tensors = {name: STATE.get(name, torch.ones(2)) for name in names}
    try:
        found = select_outgoing(
            "any", tensors, [SPEC], kind="side" if side else "model", others=True
        ).shared
    except PayloadError:
        return
    assert not set(found) & SPEC.private_keys
    assert all(found[name] is tensors[name] for name in found)
    assert set(found) == set(names) - SPEC.private_keys


def test_a_part_of_a_state_may_leave():
    found = select_outgoing("model", {"2.bias": STATE["2.bias"], "1.bias": STATE["1.bias"]}, [SPEC])
    assert set(found.shared) == {"1.bias"}
    assert found.spec is SPEC


@pytest.mark.parametrize("kind", ["side", "update"])
def test_a_side_record_is_compared_with_all_models(kind):
    other = plain_spec(["a"])
    with pytest.raises(PayloadError, match=r"record 'c'.*'2.weight', which stays on the device"):
        select_outgoing("c", {"2.weight": torch.ones(1)}, [other, SPEC], kind=kind)
    found = select_outgoing("c", {"1.weight": torch.ones(1)}, [other, SPEC], kind=kind)
    assert found.spec.keys == ("1.weight",)
    assert not found.spec.private_keys


@pytest.mark.parametrize("prefix", ["_orig_mod", "module", "module._orig_mod"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("others", [False, True])
def test_names_of_a_wrapped_model_are_refused_before_anything_is_sent(prefix, dense, others):
    """What is private is known by its name, and would leave the device under another."""
    state = SPEC.dense_state(STATE) if dense else STATE
    wrapped = {f"{prefix}.{name}": value for name, value in state.items()}
    with pytest.raises(MismatchError, match=f"Answer with the state.*model.{prefix}.state_dict"):
        select_outgoing("model", wrapped, [SPEC], others=others)


def test_tensors_that_the_model_does_not_have():
    spec, tensors = plain_spec(["a.weight"]), {"a.weight": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(MismatchError, match="'b', which the model does not have"):
        check_names(spec, tensors)
    check_names(spec, tensors, others=True)


def test_the_model_that_a_state_belongs_to_is_one_that_the_client_has_built():
    other = plain_spec(["0.weight", "0.bias"])
    built = {frozenset(spec.keys): spec for spec in (other, SPEC)}
    assert spec_among(built, STATE) is SPEC
    assert spec_among(built, {"2.weight": STATE["2.weight"]}) is SPEC
    part = plain_spec(["2.bias", "1.bias"])
    more = {**built, frozenset(part.keys): part}
    assert spec_among(more, dict.fromkeys(part.keys, torch.ones(1))) is part
    assert spec_among(built, dict.fromkeys(other.keys, torch.ones(1))) is other
    assert not spec_among(built, {"x": torch.ones(1)}).private_keys
    with pytest.raises(MismatchError, match="wrapped"):
        spec_among(built, {f"module.{name}": value for name, value in STATE.items()})
