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
