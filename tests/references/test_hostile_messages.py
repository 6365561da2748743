"""The receiving end: whatever a header says, a typed error or a sound state."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec
from fedpara_plugins.codecs import parse_codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.references import ClientReferences, GridDownlink, PerClientDownlink
from fedpara_plugins.references.version_zero import derive_reference, reference_from_header
from fedpara_plugins.testing.hostile import check_refusal, damaged, parts

LIMIT = 10**5
FEW = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

plain = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=9)
json_like = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def spec():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(48, 40), torch.nn.Linear(40, 5))
    return ModelSpec.of(fedpara.convert(net, method="pfedpara", gamma=0.1, init="seeded"))


@pytest.fixture(scope="module")
def messages(spec):
    """Against version 0, against zeros, and against what the client holds, of both schemes."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape) for name, shape in spec.shared_shapes().items()}
    found = []
    for scheme in (PerClientDownlink(), GridDownlink()):
        given_ = {"spec": spec, "codec": parse_codec("small")}
        first = scheme.encode("a", "m", state, **given_)
        client = ClientReferences()
        received = client.receive("m", first.payload, limit=LIMIT)
        client.keep("m", received)
        scheme.acknowledge("a", "m", received.reference)
        moved = {name: value + 0.01 for name, value in state.items()}
        update = scheme.encode("a", "m", moved, **given_)
        scheme.refused("a", "m")
        full = scheme.encode("a", "m", moved, **given_)
        assert [part.kind for part in (first, update, full)] == ["first", "update", "full"]
        storage = dict(client._storage)
        found += [(part.payload, storage) for part in (first, update, full)]
    return found


@FEW
@given(place=st.integers(0, 5), seed=st.integers(0, 2**32), times=st.integers(1, 3))
def test_a_damaged_message_is_refused_or_gives_a_state_within_the_limit(
    messages, spec, place, seed, times
):
    data, held = messages[place]
    draw = random.Random(seed)
    for _ in range(times):
        data = damaged(data, draw)
    for expect in (None, spec):
        storage = dict(held)
        client = ClientReferences(storage)
        try:
            received = client.receive("m", data, limit=LIMIT, expect=expect)
        except PayloadError as error:
            check_refusal(error)
            assert storage == held
        else:
            assert sum(value.nbytes for value in received.tensors.values()) <= LIMIT


def test_the_messages_are_sound(messages, spec):
    for data, held in messages:
        received = ClientReferences(dict(held)).receive("m", data, limit=LIMIT, expect=spec)
        assert list(received.tensors) == list(spec.shared_shapes())


@FEW
@given(base=json_like, model=json_like)
def test_any_description_of_version_zero(base, model):
    try:
        found = reference_from_header({"base": base}, model, limit=LIMIT)
    except PayloadError as error:
        check_refusal(error)
    else:
        assert sum(value.nbytes for value in found.tensors.values()) <= LIMIT


@FEW
@given(place=st.integers(0, 5), value=json_like)
def test_any_value_in_a_row_of_a_model(spec, place, value):
    """Both as a description to rebuild a model from and as one to draw version 0 from."""
    described = spec.to_json()
    described["weights"][0][place] = value
    state = {name: torch.zeros(shape) for name, shape in spec.shared_shapes().items()}
    extra = derive_reference("zeros", spec, state).extra
    extra = {"base": {**extra["base"], "kind": "seeded"}}
    for attempt in (
        lambda: ModelSpec.from_json(described, tuple(state), limit=LIMIT).initial_private(),
        lambda: reference_from_header(extra, described, limit=LIMIT),
        lambda: spec.check_described(described, here="here", there="there"),
    ):
        try:
            attempt()
        except PayloadError as error:
            check_refusal(error)


@FEW
@given(name=st.sampled_from(["seed", "weights", "private", "own", "fingerprint"]), value=json_like)
@example(name="own", value=[[None, None], [False, None]])
@example(name="own", value={"a": None, "b": [None]})
def test_any_value_in_a_description_of_a_model(spec, name, value):
    described = {**spec.to_json(), name: value}
    for attempt in (
        lambda: ModelSpec.from_json(described, spec.shared_keys, limit=LIMIT).initial_private(),
        lambda: spec.check_described(described, here="here", there="there"),
    ):
        try:
            attempt()
        except PayloadError as error:
            check_refusal(error)


def test_a_message_of_another_model_is_refused_before_it_is_decoded(messages):
    other = ModelSpec.of(fedpara.convert(torch.nn.Linear(48, 40), method="fedpara", gamma=0.9))
    for data, held in messages:
        _, header, _ = parts(data)
        assert header["model"]["fingerprint"] != other.fingerprint
        with pytest.raises(fedpara.MismatchError, match="this side"):
            ClientReferences(dict(held)).receive("m", data, limit=LIMIT, expect=other)
