"""Run configs of a curious server: what a device pins or keeps holds whatever they say."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord

import fedpara_plugins as core
import fedpara_plugins_flower as fedpara
from fedpara_plugins.models import ModelSpec
from harness.flower.hostile_cases import CASES, OPTIONS, Case, check_nothing_left, section
from harness.flower.hostile_server import Net, Reply, described, planted
from harness.processes.canaries import Canaries

QUERY = {"config": ConfigRecord({"a": 1})}

LOOSER: dict[str, dict[str, Any] | None] = {
    "no section": None,
    "method none": {"method": "none"},
    "method none, codec": {"method": "none", "codec": "lossless"},
    "fedpara": {"method": "fedpara", "local": "factors"},
    "lowrank": {"method": "lowrank", "local": "factors"},
    "pfedpara, no names": {"private": ""},
    "nothing private": {"method": "fedpara", "private": "", "local": "factors"},
    "another name": {"private": "body.bias"},
    "overrides": {"overrides": "*: method=none"},
    "min size": {"min_size": 10**9},
    "exclude": {"exclude": "head"},
    "include": {"include": "body"},
    "seed": {"seed": 5},
    "gamma": {"gamma": 0.6},
    "dense": {"local": "dense"},
    "factors": {"local": "factors"},
}
"""By name, what a server changes in the run's config; None leaves the plugin's section out."""


def _config(case: Case, name: str) -> dict[str, Any]:
    changes = LOOSER[name]
    return {} if changes is None else section({**case.options, **changes})


def _contents(options: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages as an honest server sends them with these options, and plain ones."""
    net = Net().state_dict()
    plain = ArrayRecord({key: Array(value.numpy()) for key, value in net.items()})
    alone = ModelSpec(weights={}, keys=tuple(net), seed=0)
    contents: list[dict[str, Any]] = [{"arrays": described(alone.to_json(), net)}]
    contents += [{"arrays": plain}, QUERY]
    flat = {key.removeprefix("fedpara."): value for key, value in options.items()}
    try:
        model = core.convert(Net(), core.FedParaConfig.from_mapping(flat))
    except core.FedParaError:  # no honest server has such options
        return contents
    shared = core.split(model).shared
    return [{"arrays": described(ModelSpec.of(model).to_json(), shared)}, *contents]


def _sent(device: Any, config: dict[str, Any]) -> list[Reply]:
    return [
        device.send(content, kind, run_config=config)
        for content in _contents(config)
        for kind in ("train", "evaluate", "query")
    ]


@pytest.mark.in_turn
@pytest.mark.parametrize("cached", [False, True], ids=["built anew", "cached"])
@pytest.mark.parametrize("looser", LOOSER)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_client_with_private_state(case: Case, looser: str, cached: bool) -> None:
    """It has been trained once by the honest options, and is not pinned."""
    device = case.device(cached=cached)
    first = device.send({"arrays": case.honest()})
    check_nothing_left(case, first)
    if first.error:
        return  # it keeps no state: its code builds no model that the plugin knows
    replies = _sent(device, _config(case, looser))
    kept = {"exclude", "include"}  # the other layer's values of this training are shared there
    if case.local == "factors" or looser not in kept:
        check_nothing_left(case, *replies)


PINNED = {
    "private": (CASES["private head"], {"fedpara-private": "head.*"}),
    "private, plain app": (CASES["private head, plain app"], {"fedpara-private": "head.*"}),
    "private norm": (CASES["private norm and factors"], {"fedpara-private": "norm.*"}),
    "method": (CASES["pfedpara"], {"fedpara-method": "pfedpara"}),
    "method, cached": (CASES["pfedpara"], {"fedpara-method": "pfedpara"}),
    "method, names": (
        CASES["all"],
        {"fedpara-method": "pfedpara", "fedpara-private": "norm.*,head.bias"},
    ),
    "method, names, dotted": (
        CASES["all"],
        {"fedpara.method": "pfedpara", "fedpara.private": "norm.*,head.bias"},
    ),
    "method, dense": (CASES["dense"], {"fedpara-method": "pfedpara"}),
}


@pytest.mark.in_turn
@pytest.mark.parametrize("where", ["node config", "code"])
@pytest.mark.parametrize("looser", LOOSER)
@pytest.mark.parametrize("pin", PINNED)
def test_a_client_with_a_pin(pin: str, looser: str, where: str) -> None:
    """It has no state: the first message comes with the looser options."""
    case, node_config = PINNED[pin]
    given: dict[str, Any] = {"node_config": node_config}
    if where == "code":
        pins = {key[len("fedpara-") :]: value for key, value in node_config.items()}
        options = {**OPTIONS, **pins}
        given = {"mods": [fedpara.client_mod_with(**options)]}
    device = case.device(cached="cached" in pin, **given)
    replies = _sent(device, _config(case, looser))
    check_nothing_left(case, *replies)
    dense = ("exclude", "include", "min size")
    if looser in ("method none", "fedpara", "lowrank", "no section", *dense) and "method" in pin:
        assert all(reply.error and not reply.ran for reply in replies[:3])
        assert all("pfedpara" in reply.error for reply in replies[:3])


@pytest.mark.parametrize("pin", [name for name in PINNED if "dense" not in name])
def test_a_pin_that_the_run_agrees_with_changes_nothing(pin: str) -> None:
    case, node_config = PINNED[pin]
    replies = [
        case.device(node_config=pins).send({"arrays": case.honest()}) for pins in ({}, node_config)
    ]
    assert [reply.error for reply in replies] == ["", ""]
    one, other = (reply.tensors["arrays"] for reply in replies)
    assert one.keys() == other.keys() == case.shared.keys()
    check_nothing_left(case, *replies)


def test_a_run_may_keep_more_private_than_the_pin() -> None:
    case = CASES["all"]
    device = case.device(node_config={"fedpara-private": "norm.bias"})
    reply = device.send({"arrays": case.honest()})
    assert reply.error == ""
    check_nothing_left(case, reply)


@pytest.mark.parametrize("pin", ["nonsense.*", "body.bias"])
def test_a_pin_that_the_server_lacks_is_refused_with_both_sides(pin: str) -> None:
    case = CASES["pfedpara"]
    reply = case.device(node_config={"fedpara-private": pin}).send({"arrays": case.honest()})
    assert "private" in reply.error
    assert pin in reply.error


@pytest.mark.parametrize("added", [{"label_prior": True}], ids=str)
@pytest.mark.parametrize("cached", [False, True], ids=["built anew", "cached"])
def test_what_is_added_to_the_head_stays_whatever_later_messages_say(
    added: dict[str, Any], cached: bool
) -> None:
    """An app may still hold the model that it has built by the first message's options."""
    case = Case("fedpara", **added)
    names = ModelSpec.of(core.convert(Net(), case.config)).private_keys
    secret = Canaries(list(planted({name: case.state[name] for name in names}).values()))
    shared = {key: value for key, value in case.state.items() if key not in names}
    device = case.device(cached=cached)
    first = device.send({"arrays": described(case.spec.to_json(), shared)})
    assert names
    assert first.error == ""
    off = dict.fromkeys(added, False)
    for looser in ({**case.options, **off}, {"method": "none", "codec": "lossless"}, {}):
        for reply in (first, *_sent(device, section(looser))):
            assert secret.found_in(reply.data) == 0
            for tensors in reply.tensors.values():
                assert not names & tensors.keys()
