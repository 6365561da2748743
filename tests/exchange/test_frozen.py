"""Frozen tensors: the server's agreement, and where a client takes them from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fedpara_plugins as fedpara
from fedpara_plugins import MismatchError, ModelSpec, PayloadError
from fedpara_plugins.codecs import decode_payload
from fedpara_plugins.exchange.frozen import FrozenAgreement, tensor_hash
from fedpara_plugins.exchange.frozen_source import FrozenSource, LacksFrozenError
from fedpara_plugins.models.frozen import frozen_tensors

State = dict[str, Tensor]


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 3))
    net[0].requires_grad_(False)
    return net


def state_of(net: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def settled(full: State, agreement: FrozenAgreement | None = None) -> tuple[State, ModelSpec]:
    net = model()
    agreement = agreement or FrozenAgreement()
    return agreement.settle("model", full, ModelSpec.of(net), frozen_tensors(net))


def test_frozen_are_parameters_without_gradients_and_no_buffers() -> None:
    net = model()
    net[1].requires_grad_(False)
    assert set(frozen_tensors(net)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_where_no_parameter_is_trained_none_is_frozen() -> None:
    assert frozen_tensors(model().requires_grad_(False)) == {}


def test_what_a_quantised_layer_keeps_beside_a_frozen_weight_is_frozen_too() -> None:
    class Quantised(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):  # type: ignore[no-untyped-def]
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "weight.absmax"] = torch.ones(2)

    net = nn.Sequential(Quantised(4, 4).requires_grad_(False), nn.Linear(4, 4))
    assert set(frozen_tensors(net)) == {"0.weight", "0.bias", "0.weight.absmax"}


def test_the_description_names_them_and_is_read_back() -> None:
    full = state_of(model())
    _, spec = settled(full)
    assert spec.frozen == {name: tensor_hash(name, full[name]) for name in ("0.weight", "0.bias")}
    assert not set(spec.shared_keys) & set(spec.frozen)
    read = ModelSpec.from_json(spec.to_json(), spec.shared_keys)
    assert read == spec
    assert read.frozen == spec.frozen
    assert read.fingerprint == ModelSpec.of(model()).fingerprint


@pytest.mark.parametrize(
    "rows",
    [
        [[0, "0.weight", "short"]],
        [[0, 7, "0" * 32]],
        [[0, "1.weight", "0" * 32]],
        [[99, "x", "0" * 32]],
        "none",
    ],
    ids=["hash", "name", "twice", "place", "kind"],
)
def test_unsound_rows_are_refused(rows: object) -> None:
    _, spec = settled(state_of(model()))
    with pytest.raises(PayloadError, match=r"malformed|fingerprint"):
        ModelSpec.from_json({**spec.to_json(), "frozen": rows}, spec.shared_keys)


def test_an_averages_rounding_is_taken_back() -> None:
    """A mean of equal values is not always that value."""
    agreement, first = FrozenAgreement(), state_of(model())
    _, before = settled(first, agreement)
    mean = {k: v * (1 + 2e-7) if v.is_floating_point() else v for k, v in first.items()}
    assert not torch.equal(mean["0.weight"], first["0.weight"])
    again, spec = settled(mean, agreement)
    assert torch.equal(again["0.weight"], first["0.weight"])
    assert torch.equal(again["2.weight"], mean["2.weight"])
    assert spec.frozen == before.frozen


def test_a_run_that_is_continued_agrees_on_the_models_own_values() -> None:
    first = state_of(model())
    resumed = {k: v * (1 + 2e-7) if v.is_floating_point() else v for k, v in first.items()}
    _, spec = settled(resumed)
    assert spec.frozen["0.weight"] == tensor_hash("0.weight", first["0.weight"])


def test_what_the_strategy_changes_is_sent_from_then_on(caplog) -> None:  # type: ignore[no-untyped-def]
    agreement, full = FrozenAgreement(), state_of(model())
    settled(full, agreement)
    changed = {**full, "0.weight": full["0.weight"] + 1}
    with caplog.at_level("INFO", logger="fedpara"):
        after, spec = settled(changed, agreement)
    assert set(spec.frozen) == {"0.bias"}
    assert torch.equal(after["0.weight"], changed["0.weight"])
    assert "'0.weight'" in caplog.text
    assert "sent from now on" in caplog.text


def test_a_client_that_lacks_them_gets_them_once_and_exactly() -> None:
    agreement, full = FrozenAgreement(), state_of(model())
    settled(full, agreement)
    assert agreement.payload_for("7", "model") is None
    assert agreement.note_lacking("7", ["model", "elsewhere"]) == 1
    payload = agreement.payload_for("7", "model")
    assert payload is not None
    sent = decode_payload(payload, limit=10**6).tensors
    assert {k: torch.equal(v, full[k]) for k, v in sent.items()} == {
        "0.weight": True,
        "0.bias": True,
    }
    assert agreement.payload_for("7", "model") is None


def test_what_the_strategy_has_changed_since_a_client_asked_is_sent_to_everybody() -> None:
    agreement, full = FrozenAgreement(), state_of(model())
    settled(full, agreement)
    assert agreement.note_lacking("7", ["model"]) == 1
    settled({name: value + 1 for name, value in full.items()}, agreement)
    assert agreement.payload_for("7", "model") is None


def test_a_client_that_lost_its_copy_gets_it_again() -> None:
    agreement = FrozenAgreement()
    settled(state_of(model()), agreement)
    agreement.note_lost("7", "model")
    assert agreement.payload_for("7", "model") is None  # it has had none: its own will do
    agreement.note_lacking("7", ["model"])
    payload = agreement.payload_for("7", "model")
    agreement.note_lost("7", "elsewhere")
    assert agreement.payload_for("7", "model") is None
    agreement.note_lost("7", "model")
    assert agreement.payload_for("8", "model") is None
    assert agreement.payload_for("7", "model") == payload
    assert agreement.payload_for("7", "model") is None


# A client


def values(own: nn.Module | None, kept: State | None = None) -> State:
    full, spec = settled(state_of(model()))
    shared = {name: full[name] for name in spec.shared_keys}
    states = () if own is None else [(ModelSpec.of(own), own.state_dict())]
    return FrozenSource(lambda: states, lambda record: kept or {}).values("model", spec, shared)


def test_its_own_model_holds_them() -> None:
    found = values(model())
    assert set(found) == {"0.weight", "0.bias"}
    assert torch.equal(found["0.weight"], model()[0].weight)


def test_a_copy_that_was_sent_once_holds_them() -> None:
    kept = {k: v for k, v in state_of(model()).items() if k.startswith("0.")}
    assert torch.equal(values(model(seed=1), kept)["0.weight"], kept["0.weight"])
    assert torch.equal(values(None, kept)["0.weight"], kept["0.weight"])


@pytest.mark.parametrize("own", [None, model(seed=1)], ids=["no model", "drawn anew"])
def test_without_them_the_server_is_asked(own: nn.Module | None) -> None:
    with pytest.raises(LacksFrozenError) as caught:
        values(own)
    assert caught.value.record == "model"


def test_a_forged_copy_does_not_count() -> None:
    with pytest.raises(LacksFrozenError):
        values(None, {"0.weight": torch.zeros(24, 24), "0.bias": torch.zeros(24)})


def test_weights_that_look_trained_are_not_replaced() -> None:
    own = model()
    with torch.no_grad():
        own[0].weight += torch.outer(torch.linspace(-1, 1, 24), torch.linspace(-3, 3, 24))
    mine, theirs = own[0].weight, model()[0].weight
    with pytest.raises(MismatchError) as caught:
        values(own)
    assert tensor_hash("0.weight", mine) in str(caught.value)
    assert tensor_hash("0.weight", theirs) in str(caught.value)
    assert 'send = "all"' in str(caught.value)


def test_of_a_private_tensor_not_even_the_hash_is_told() -> None:
    own = fedpara.convert(model(seed=1), method="none", private="0.*")
    with pytest.raises(MismatchError, match="keeps it private") as caught:
        values(own)
    assert tensor_hash("0.weight", own[0].weight) not in str(caught.value)
