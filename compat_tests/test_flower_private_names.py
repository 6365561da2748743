"""The option ``private``: FedPer and FedBN, with any method, against plain loops in torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpara_plugins as fedpara
from harness.cells.flower import GAMMA
from harness.flower.apps import Experiment, Hooks, Outcome, federate, plugin_apps
from harness.oracles.cell_model import slow_options
from harness.oracles.plain_loop import RULES, run_plain_loop
from harness.oracles.private_start import fix_private_start
from harness.oracles.task import TrainingTask

State = dict[str, Tensor]

FEDPER = ("groupnorm", "fc2.*")
FEDBN = ("batchnorm", "norm*")


def _section(method: str, private: str, codec: str = "none", **more: Any) -> dict[str, Any]:
    options = {"method": method, "gamma": GAMMA, "codec": codec, "private": private, **more}
    return {f"fedpara.{key.replace('_', '-')}": value for key, value in options.items()}


@pytest.fixture(autouse=True)
def _one_private_start(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_private_start(monkeypatch)


def _run(task: TrainingTask, section: dict[str, Any]) -> tuple[Outcome, dict[int, State]]:
    after: dict[int, State] = {}

    def trained(model: nn.Module, client: int, server_round: int) -> None:
        after[client] = {k: v.detach().clone() for k, v in fedpara.split(model).private.items()}

    apps = plugin_apps(Experiment(task, "fedavg", {}, Hooks(trained=trained)))
    return federate(apps, section), after


@pytest.mark.in_turn
@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
@pytest.mark.parametrize(("model", "private"), [FEDPER, FEDBN], ids=["fedper", "fedbn"])
def test_it_equals_a_plain_loop_that_keeps_those_names(
    model: str, private: str, method: str
) -> None:
    task = TrainingTask(model=model, rounds=3, epochs=1)
    outcome, after = _run(task, _section(method, private))

    def build() -> nn.Module:
        net = fedpara.convert(task.net(), method=method, gamma=GAMMA, private=(private,))
        first = fedpara.ModelSpec.of(net).initial_private()
        net.load_state_dict({**net.state_dict(), **first})
        return net

    names = fedpara.split(build()).private.keys()
    assert any(name.startswith(private.rstrip(".*")) for name in names)
    expected = run_plain_loop(task, build, RULES["fedavg"](), private_names=names)
    for client in range(task.clients):
        for name in names:
            torch.testing.assert_close(
                after[client][name], expected.private[client][name], rtol=1e-4, atol=1e-5
            )
    for name in expected.state.keys() - names:
        torch.testing.assert_close(
            outcome.state[name].double(), expected.state[name], rtol=1e-4, atol=1e-5
        )


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("method", ["none", "pfedpara"])
def test_private_names_are_in_no_message(method: str, codec: str) -> None:
    """Every message names its tensors in a header; the values stay in the client's state."""
    task = TrainingTask(rounds=2, epochs=1)
    outcome, after = _run(task, _section(method, "fc2.*", codec, **slow_options(method)))
    # The server's own head never learns; the clients' do.
    assert outcome.client_accuracies[2] > outcome.client_accuracies[1]
    value = after[0]["fc2.weight"].numpy().tobytes()
    kept = outcome.grid.client_state(0).array_records.values()
    assert any(value in bytes(array.data) for record in kept for array in record.values())
    for sent in outcome.sent:
        assert value not in sent.data
        for client in after:
            assert after[client]["fc2.bias"].numpy().tobytes() not in sent.data


def test_a_pattern_that_matches_nothing_ends_the_run_with_its_name() -> None:
    with pytest.raises(fedpara.ConfigError, match=r"'option 'private'|'haed\.\*' matches no name"):
        _run(TrainingTask(rounds=1, epochs=1), _section("none", "haed.*"))


def test_the_server_has_to_build_its_model_where_the_plugin_sees_it() -> None:
    apps = plugin_apps(
        Experiment(TrainingTask(rounds=1, epochs=1), "fedavg", {}), server=frozenset({"app"})
    )
    with pytest.raises(fedpara.ConfigError, match=r"option 'private' is on.*factorised\(Net\)"):
        federate(apps, _section("none", "fc2.*"))
