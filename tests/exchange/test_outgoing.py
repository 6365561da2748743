"""What may leave a client."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError, MismatchError, ModelSpec, PayloadError
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.exchange import OwnModel, OwnModels
from fedpara_plugins.exchange.outgoing import check_names, select_outgoing
from fedpara_plugins.exchange.records import plain_spec
from fedpara_plugins.models.state_parts import shapes_of


def small():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48), nn.Linear(48, 4))
    return fedpara.convert(net, method="pfedpara", gamma=0.2, private="2.*", min_size=256)


MODEL = small()
SPEC, STATE = ModelSpec.of(MODEL), MODEL.state_dict()
CONFIG = FedParaConfig(method="pfedpara", gamma=0.2, private="2.*", min_size=256)


def owning(*specs, config=CONFIG):
    return OwnModels(config, [OwnModel(spec, 1000) for spec in specs])


@given(st.sets(st.sampled_from([*STATE, "note", "0.x2x", "other.0.x1"])), st.booleans())
def test_private_names_never_leave_whatever_else_is_there(names, side):
    tensors = {name: STATE.get(name, torch.ones(2)) for name in names}
    try:
        found = select_outgoing(
            "any", tensors, owning(SPEC), kind="side" if side else "model"
        ).shared
    except PayloadError:
        return
    assert not set(found) & SPEC.private_keys
    assert all(found[name] is tensors[name] for name in found)
    assert set(found) == set(names) - SPEC.private_keys


def test_a_part_of_a_state_may_leave():
    part = {"2.bias": STATE["2.bias"], "1.bias": STATE["1.bias"]}
    found = select_outgoing("model", part, owning(SPEC), received=SPEC)
    assert set(found.shared) == {"1.bias"}
    assert found.spec is SPEC


@pytest.mark.parametrize("kind", ["side", "update"])
def test_a_side_record_is_compared_with_all_models(kind):
    other = plain_spec(["a"])
    with pytest.raises(PayloadError, match=r"record 'c'.*'2.weight', which stays on the device"):
        select_outgoing("c", {"2.weight": torch.ones(1)}, owning(other, SPEC), kind=kind)
    found = select_outgoing("c", {"1.weight": torch.ones(1)}, owning(other, SPEC), kind=kind)
    assert found.spec.keys == ("1.weight",)
    assert not found.spec.private_keys


@pytest.mark.parametrize("prefix", ["_orig_mod", "module", "module._orig_mod"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("received", [None, SPEC])
def test_names_of_a_wrapped_model_are_refused_before_anything_is_sent(prefix, dense, received):
    """What is private is known by its name, and would leave the device under another."""
    state = SPEC.dense_state(STATE) if dense else STATE
    wrapped = {f"{prefix}.{name}": value for name, value in state.items()}
    with pytest.raises(MismatchError, match=f"Answer with the state.*model.{prefix}.state_dict"):
        select_outgoing("model", wrapped, owning(SPEC), received=received)


def test_tensors_that_the_model_does_not_have():
    spec, tensors = plain_spec(["a.weight"]), {"a.weight": torch.ones(1), "b": torch.ones(1)}
    with pytest.raises(MismatchError, match="'b', which the model does not have"):
        check_names(spec, tensors)
    check_names(spec, tensors, others=True)


def test_the_model_that_a_state_belongs_to_is_one_that_the_client_has_built():
    other, part = plain_spec(["0.weight", "0.bias"]), plain_spec(["2.bias", "1.bias"])

    def found(tensors, *specs):
        return select_outgoing("any", tensors, owning(*specs)).spec

    assert found(STATE, other, SPEC) is SPEC
    assert found({"2.bias": STATE["2.bias"]}, other, SPEC).private_keys == {"2.bias"}
    assert found(dict.fromkeys(part.keys, torch.ones(1)), other, SPEC, part) is part
    assert not found({"x": torch.ones(1)}, other, SPEC).private_keys


def test_composed_weights_hold_private_values_and_do_not_leave():
    """An app that answers with the dense state would send W2 within W."""
    dense = SPEC.dense_state(STATE)
    for received in (SPEC, None):
        with pytest.raises(MismatchError, match=r"composed weight '0\.weight'"):
            select_outgoing("model", dense, owning(SPEC), received=received)
    with pytest.raises(MismatchError, match=r"composed weight '0\.weight'"):
        select_outgoing("side", {"0.weight": dense["0.weight"]}, owning(SPEC), kind="side")


LIES = {
    "nothing private": plain_spec(STATE),
    "names removed": ModelSpec(
        SPEC.weights, tuple(k for k in SPEC.keys if k not in SPEC.own), SPEC.seed
    ),
    "own made shared": ModelSpec(SPEC.weights, SPEC.keys, SPEC.seed),
    "a plain model of the dense names": plain_spec(SPEC.dense_state(STATE)),
}


@pytest.mark.parametrize("lie", LIES)
def test_what_a_message_says_does_not_count(lie):
    """The received description is not the client's own: nothing leaves by it."""
    with pytest.raises(MismatchError):
        select_outgoing("model", STATE, owning(SPEC), received=LIES[lie])
    if lie == "names removed":  # a part of the model, which is private as the model says
        assert owning(SPEC).agreed(LIES[lie]).private_keys == SPEC.private_factors
    else:
        with pytest.raises(MismatchError):
            owning(SPEC).agreed(LIES[lie])
    if lie != "names removed":  # which options alone do not tell
        with pytest.raises(MismatchError):
            owning().agreed(LIES[lie])


def test_without_an_own_model_nothing_leaves_that_may_be_private():
    for received in (SPEC, plain_spec(STATE), None):
        for kind in ("model", "side"):
            with pytest.raises(ConfigError, match=r"Net = fedpara\.factorised\(Net\)"):
                select_outgoing("model", STATE, owning(), received=received, kind=kind)


@pytest.mark.parametrize("described", ["private", "shared", None])
def test_patterns_hold_without_a_model(described):
    config = FedParaConfig(private="2.*")
    names = ("1.weight", "2.weight")
    row = {"2.weight": SPEC.own["2.weight"]} if described == "private" else {}
    received = None if described is None else ModelSpec({}, names, 0, own=row)
    tensors = dict.fromkeys(names, torch.ones(1))
    found = select_outgoing("model", tensors, owning(config=config), received=received)
    assert set(found.shared) == {"1.weight"}


@pytest.mark.parametrize("names", [["net.1.weight", "net.2.weight"], ["1.weight"]])
def test_names_that_no_pattern_matches_may_be_other_names_for_the_same(names):
    own = owning(config=FedParaConfig(private="2.*"))
    for received in (None, plain_spec(names)):
        with pytest.raises(ConfigError, match=r"private \('2\.\*'\) matches none of the . names"):
            select_outgoing("any", dict.fromkeys(names, torch.ones(1)), own, received=received)


def test_a_list_without_names_may_hold_anything():
    tensors = dict.fromkeys("01", torch.ones(1))
    private = FedParaConfig(private="2.*")
    for own in (owning(SPEC), owning(config=private), owning(plain_spec("ab"), config=private)):
        for received in (None, plain_spec("01")):
            with pytest.raises(PayloadError, match="a list of 2 arrays without names"):
                select_outgoing("any", tensors, own, received=received)
    for own in (owning(plain_spec("01"), config=private), owning(config=FedParaConfig())):
        assert set(select_outgoing("any", tensors, own).shared) == {"0", "1"}


@pytest.mark.parametrize("kind", ["model", "side"])
def test_patterns_count_for_every_record(kind):
    """But for factors, which only the method makes private."""
    own = owning(SPEC, config=FedParaConfig(method="pfedpara", private=["2.*", "0.*", "note*"]))
    tensors = {"0.x1": STATE["0.x1"], "notes": torch.ones(1)}
    if kind == "model":
        assert set(select_outgoing("any", tensors, own).shared) == {"0.x1"}
        return
    with pytest.raises(PayloadError, match="'notes', which stays"):
        select_outgoing("any", tensors, own, kind="side")
    assert select_outgoing("any", {"0.x1": STATE["0.x1"]}, own, kind="side").shared


def test_a_list_is_named_by_an_own_model_alone():
    owning(SPEC).check_order_known(SPEC)
    for own in (owning(), owning(plain_spec("ab")), owning(config=FedParaConfig(private="a"))):
        with pytest.raises(ConfigError, match="which of the arrays are private"):
            own.check_order_known(SPEC)
    owning(config=FedParaConfig(method="fedpara")).check_order_known(SPEC)


class Backbone(nn.Module):
    """A body that is shared, and a head inside of a module, some of it private."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(64, 48)
        self.heads = nn.Module()
        self.heads.head = nn.Linear(48, 32)


def owning_backbone(**options):
    torch.manual_seed(0)
    options = {"method": "none", "gamma": 0.2, "min_size": 256, **options}
    model = fedpara.convert(Backbone(), **options)
    state = model.state_dict()
    own = OwnModel(ModelSpec.of(model), 10**5, shapes_of(state))
    return model, OwnModels(FedParaConfig(**options), [own])


@pytest.mark.parametrize("received", [None, plain_spec(["head.weight", "head.bias"])])
def test_private_tensors_do_not_leave_under_the_names_of_a_module_inside(received):
    model, own = owning_backbone(private="heads.head.bias")
    head = model.heads.state_dict()
    try:
        found = select_outgoing("any", head, own, received=received).shared
    except MismatchError:
        assert received is not None  # which has no private names, and lies
        return
    assert set(found) == {"head.weight"}


def test_private_factors_do_not_leave_under_the_names_of_a_module_inside():
    model, own = owning_backbone(method="pfedpara")
    found = select_outgoing("any", model.heads.state_dict(), own)
    assert set(found.shared) == {"head.x1", "head.y1", "head.bias"}


def test_where_several_modules_fit_and_one_is_private_nothing_leaves():
    net = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model = fedpara.convert(net, method="none", private="b.*")
    known = OwnModel(ModelSpec.of(model), 10**5, shapes_of(model.state_dict()))
    own = OwnModels(FedParaConfig(private="b.*"), [known])
    for received in (None, plain_spec(["weight", "bias"])):
        with pytest.raises(MismatchError, match="cannot be told which part"):
            select_outgoing("any", net["b"].state_dict(), own, received=received)


def test_tensors_apart_from_the_model_leave_where_nothing_is_private():
    _, own = owning_backbone()
    apart = {"prompt.table": torch.ones(3)}
    for received in (None, plain_spec(apart)):
        assert select_outgoing("any", apart, own, received=received).shared == apart
    _, own = owning_backbone(private="heads.*")
    with pytest.raises(MismatchError, match="cannot be told which part"):
        select_outgoing("any", apart, own, received=plain_spec(apart))


def test_a_model_whose_names_end_like_those_of_another_is_not_a_wrapped_one():
    first = nn.Sequential(nn.Linear(3, 4))
    second = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(3, 5))})
    specs = [plain_spec(net.state_dict()) for net in (first, second)]
    found = select_outgoing("any", second.state_dict(), owning(*specs, config=FedParaConfig()))
    assert set(found.shared) == {"layers.0.weight", "layers.0.bias"}


def test_a_remembered_model_knows_its_shapes():
    model, _ = owning_backbone()
    config = FedParaConfig()
    known = OwnModel(ModelSpec.of(model), 5, shapes_of(model.state_dict()))
    assert OwnModel.from_bytes(known.to_bytes(config), config) == known
