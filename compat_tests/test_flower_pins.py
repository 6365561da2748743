"""What a device's operator sets there: a run's config may add to it, and take nothing away."""

from __future__ import annotations

from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.client.options import client_settings
from fedpara_plugins_flower.pins import node_pins
from fedpara_plugins_flower.settings import FlowerSettings


def _settings(
    run: dict[str, Any], node: dict[str, Any] | None = None, **options: Any
) -> FlowerSettings:
    run_config = {f"fedpara.{key}": value for key, value in run.items()}
    return FlowerSettings.of_client(run_config, options, {}, node or {})


def _context(node: dict[str, Any], state: RecordDict, **run: Any) -> Context:
    run_config = {f"fedpara.{key.replace('_', '-')}": value for key, value in run.items()}
    return Context(run_id=1, node_id=2, node_config=node, state=state, run_config=run_config)


@pytest.mark.parametrize("key", ["fedpara-private", "fedpara.private"])
@pytest.mark.parametrize(
    ("run", "found"),
    [
        ({}, ("head.*",)),
        ({"private": ""}, ("head.*",)),
        ({"private": "head.*"}, ("head.*",)),
        ({"private": "*norm*, head.bias"}, ("head.*", "*norm*", "head.bias")),
        ({"method": "pfedpara"}, ("head.*",)),
    ],
)
def test_private_patterns_add_up(key: str, run: dict[str, Any], found: tuple[str, ...]) -> None:
    assert _settings(run, {key: "head.*"}).config.private == found
    assert _settings(run, private="head.*").config.private == found
    assert _settings(run, private=["head.*"]).active


METHODS: list[dict[str, Any]] = [
    {},
    {"method": "none"},
    {"method": "fedpara"},
    {"method": "lowrank", "private": "head.*"},
    {"method": "pfedpara", "overrides": "fc1: method=fedpara"},
    {"method": "pfedpara", "overrides": "*: method=none"},
]


@pytest.mark.parametrize("run", METHODS, ids=str)
def test_a_method_without_a_private_half_is_refused(run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"keeps method 'pfedpara' \(node config\), and the run"):
        _settings(run, {"fedpara-method": "pfedpara"})
    if run:  # without options of the run those in Python are all there is
        with pytest.raises(ConfigError, match="options of client_mod_with"):
            _settings({"method": "none", **run}, method="pfedpara")


LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("exclude", {"exclude": "head"}),
    ("exclude", {"exclude": "*", "include": "tiny"}),
    ("include", {"include": "tiny"}),
    ("min-size", {"min-size": 10**9}),
    ("min-size", {"overrides": "head: min-size=1000000"}),
]
"""Options that leave layers dense, which are then shared as a whole."""


@pytest.mark.parametrize(("option", "run"), LAYERS, ids=str)
def test_a_run_leaves_no_layer_dense_that_the_operator_has_not_named(
    option: str, run: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=rf"node config\), and the run's option {option} leaves"):
        _settings({"method": "pfedpara", **run}, {"fedpara-method": "pfedpara"})
    with pytest.raises(ConfigError, match="options of client_mod_with"):
        _settings({"method": "pfedpara", **run}, method="pfedpara")
    assert _settings({"method": "fedpara", **run}, {"fedpara-method": "fedpara"})


def test_layers_that_the_operator_leaves_dense() -> None:
    node = {"fedpara-method": "pfedpara", "fedpara-exclude": "head, emb*", "fedpara-min-size": 4096}
    for run in ({}, {"exclude": "head"}, {"exclude": "emb*", "min-size": 4000}, {"min-size": 0}):
        assert _settings({"method": "pfedpara", **run}, node).config.method == "pfedpara"
    with pytest.raises(ConfigError, match="option exclude"):
        _settings({"method": "pfedpara", "exclude": "head, body"}, node)
    node = {"fedpara-method": "pfedpara", "fedpara-include": "fc*"}
    for wide in ({}, {"include": "fc*"}, {"include": "fc*, conv*"}):
        assert _settings({"method": "pfedpara", **wide}, node).config.method == "pfedpara"
    with pytest.raises(ConfigError, match="option include"):
        _settings({"method": "pfedpara", "include": "fc1"}, node)


def test_what_is_added_to_the_head_is_not_taken_away() -> None:
    prior = {"method": "fedpara", "label_prior": True}
    assert _settings({"method": "fedpara", "label-prior": False}, **prior).config.label_prior
    assert _settings({"method": "pfedpara"}, **prior).config.label_prior
    with pytest.raises(ConfigError, match=r"label_prior \(options of client_mod_with\)"):
        _settings({"method": "none"}, **prior)
    head = {"method": "pfedpara", "schedule": "decoupled", "private_head": "true"}
    assert _settings({"private-head": "false"}, **head).config.private_head
    with pytest.raises(ConfigError, match="private_head"):
        _settings({"private-head": False, "schedule": "joint"}, **head)
    state = RecordDict()
    first = {"method": "fedpara", "label_prior": True, "exclude": "head"}
    for run in (first, {"method": "fedpara"}, {**first, "label_prior": False}):
        assert client_settings(_context({}, state, **run), {}).config.label_prior
    with pytest.raises(ConfigError, match=r"label_prior \(this run so far\)"):
        client_settings(_context({}, state), {})


def test_what_a_run_adds_is_taken() -> None:
    node = {"fedpara-method": "fedpara", "fedpara-id": "hospital-3", "other": 1}
    assert _settings({"method": "pfedpara"}, node).config.method == "pfedpara"
    assert _settings({"method": "pfedpara", "gamma": 0.5}, method="pfedpara").config.gamma == 0.5
    own = {"method": "pfedpara", "overrides": "head: method=fedpara"}
    assert _settings({"method": "pfedpara", "overrides": "head: method=fedpara"}, **own)


def test_places_of_private_values_are_the_operators() -> None:
    run = {"method": "pfedpara", "state-dir": "/seen", "client-checkpoints": "/seen"}
    found = _settings(run, {"fedpara-state-dir": "/own", "fedpara-client-checkpoints": ""})
    assert str(found.state_dir) == "/own"
    assert found.client_checkpoints is None
    assert str(_settings(run, state_dir="/own").state_dir) == "/own"
    assert str(_settings(run).state_dir) == "/seen"


def test_unknown_keys_of_a_node() -> None:
    with pytest.raises(ConfigError, match=r"'fedpara-privat' .* did you mean fedpara-private"):
        node_pins({"fedpara-privat": "head.*"})
    for key in ("fedpara_private", "Fedpara-private", "fedpara/private", "fedparaprivate"):
        with pytest.raises(ConfigError, match=f"unknown key '{key}'"):
            node_pins({key: "head.*"})
    with pytest.raises(ConfigError, match="Known: fedpara-method, fedpara-private"):
        node_pins({"fedpara.codec": "small"})


def test_a_message_may_not_loosen_what_the_first_one_of_its_run_kept() -> None:
    state = RecordDict()
    first = client_settings(_context({}, state, method="pfedpara", private="head.*"), {})
    assert first.config.private == ("head.*",)
    later = client_settings(_context({}, state, method="pfedpara", private=""), {})
    assert later.config.private == ("head.*",)
    for run in METHODS:
        with pytest.raises(ConfigError, match="this run so far"):
            client_settings(_context({}, state, **run), {})
    assert client_settings(_context({}, RecordDict(), method="fedpara"), {}).config.private == ()
