"""Dense checkpoints at the end of a run: ordinary files for the unmodified model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import fedpara_plugins as fedpara
from harness.cells.flower import CODECS, GAMMA, METHODS
from harness.flower.apps import Experiment, Hooks, Outcome, federate, plugin_apps
from harness.oracles.task import TrainingTask

TOLERANCE = 1e-4
"""On logits of some 5: float32, with W composed once or in each forward."""


def _federate(
    task: TrainingTask, method: str, codec: str, hooks: Hooks | None = None, **paths: Path
) -> Outcome:
    section: dict[str, Any] = {"method": method, "codec": codec, "gamma": GAMMA}
    section.update({key.replace("_", "-"): str(path) for key, path in paths.items()})
    apps = plugin_apps(Experiment(task, hooks=hooks or Hooks()))
    return federate(apps, {f"fedpara.{key}": value for key, value in section.items()})


def _factorised(task: TrainingTask, method: str) -> nn.Module:
    net = task.net()
    if method == "none":
        return net
    return fedpara.convert(net, method=method, gamma=GAMMA)


@torch.no_grad()
def _logits(model: nn.Module, task: TrainingTask) -> Tensor:
    model.eval()
    logits: Tensor = model(task.test_data()[0])
    return logits


def _from_file(task: TrainingTask, path: Path) -> nn.Module:
    """Load a file into the user's own, unmodified model."""
    net = task.net()
    net.load_state_dict(load_file(path), strict=True)
    return net


def _about(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        about: dict[str, str] = json.loads(file.metadata()["fedpara"])
    return about


def _assert_trained(logits: Tensor, start: Tensor) -> None:
    """Assert a trained model, neither constant nor NaN: else two models could agree for nothing."""
    assert torch.isfinite(logits).all()
    assert float(logits.std(dim=0).min()) > 0.2
    assert float((logits - start).abs().max()) > 1


@pytest.mark.in_turn
@pytest.mark.parametrize("model", ["groupnorm", "batchnorm"])
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", METHODS)
def test_the_servers_checkpoint_is_the_trained_model(
    method: str, codec: str, model: str, tmp_path: Path
) -> None:
    task, path = TrainingTask(model=model), tmp_path / "new" / "dense.safetensors"
    outcome = _federate(task, method, codec, checkpoint=path)
    torch.manual_seed(task.seed)
    converted = _factorised(task, method)
    start = _logits(converted, task)
    converted.load_state_dict(outcome.state, strict=True)
    expected = _logits(converted, task)
    _assert_trained(expected, start)
    found = _logits(_from_file(task, path), task)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    accuracy = float((found.argmax(1) == task.test_data()[1]).float().mean())
    assert accuracy == pytest.approx(outcome.accuracies[-1], abs=1 / 400 + 1e-6)
    assert load_file(path).keys() == task.net().state_dict().keys()
    assert _about(path)["method"] == method


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("on_server", "on_clients"), [(True, False), (False, True), (False, False)]
)
def test_the_last_state_is_found_wherever_the_app_evaluates_it(
    on_server: bool, on_clients: bool, codec: str, tmp_path: Path
) -> None:
    """An app that evaluates nowhere after its last round gets no file, and a line that says why."""
    task, path = TrainingTask(rounds=2, epochs=1), tmp_path / "dense.safetensors"
    options = {"fraction_evaluate": 1.0 if on_clients else 0.0}
    apps = plugin_apps(Experiment(task, options=options, evaluate_fn=on_server))
    config: dict[str, str | float] = {
        "fedpara.method": "fedpara",
        "fedpara.gamma": GAMMA,
        "fedpara.codec": codec,
        "fedpara.checkpoint": str(path),
    }
    outcome = federate(apps, config)
    if not (on_server or on_clients):
        assert not path.exists()
        assert any("no checkpoint written" in line for line in outcome.log)
        return
    converted = _factorised(task, "fedpara")
    converted.load_state_dict(outcome.state, strict=True)
    found = _logits(_from_file(task, path), task)
    torch.testing.assert_close(found, _logits(converted, task), atol=TOLERANCE, rtol=0)


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", CODECS)
def test_the_servers_checkpoint_of_pfedpara_is_w1_and_says_so(codec: str, tmp_path: Path) -> None:
    """Composed here by hand from the shared factors of a Linear layer: s * X1 Y1ᵀ."""
    task, path = TrainingTask(), tmp_path / "dense.safetensors"
    outcome = _federate(task, "pfedpara", codec, checkpoint=path)
    about = _about(path)
    assert "W1" in about["model"]
    assert "private part zero" in about["model"]
    product = outcome.state["fc1.x1"] @ outcome.state["fc1.y1"].T
    weight = load_file(path)["fc1.weight"]
    scale = float((product * weight).sum() / (product * product).sum())
    torch.testing.assert_close(weight, scale * product, atol=1e-6, rtol=1e-5)
    assert float(weight.std()) > 0.01


@pytest.mark.parametrize("method", ["none", "lowrank", "fedpara"])
def test_other_methods_do_not_claim_to_be_w1(method: str, tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    _federate(TrainingTask(rounds=1, epochs=1), method, "int8", checkpoint=path)
    assert _about(path)["model"] == "the server's model"


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("method", ["fedpara", "pfedpara"])
def test_each_client_exports_its_own_model(method: str, codec: str, tmp_path: Path) -> None:
    """Written where the client has just evaluated it: shared part as received, private its own."""
    task = TrainingTask()
    own: dict[int, Tensor] = {}

    def evaluated(model: nn.Module, client: int, server_round: int) -> None:
        own[client] = _logits(model, task)

    paths = {"checkpoint": tmp_path / "server.safetensors", "client_checkpoints": tmp_path / "own"}
    _federate(task, method, codec, Hooks(evaluated=evaluated), **paths)
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [
        f"client-{client}.safetensors" for client in range(task.clients)
    ]
    torch.manual_seed(task.seed)
    start = _logits(_factorised(task, method), task)
    server = _logits(_from_file(task, paths["checkpoint"]), task)
    for client, expected in own.items():
        path = tmp_path / "own" / f"client-{client}.safetensors"
        found = _logits(_from_file(task, path), task)
        _assert_trained(found, start)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        assert f"client {client}" in _about(path)["model"]
        # With private factors the clients' models differ from W1 and from each other.
        others = [own[other] for other in own if other != client] + [server]
        apart = min(float((found - other).abs().max()) for other in others)
        if method == "pfedpara":
            assert apart > 100 * TOLERANCE
        elif codec == "none":
            assert apart <= TOLERANCE


@pytest.mark.parametrize(
    ("method", "codec"), [("none", "lossless"), ("lowrank", "none"), ("fedpara", "small")]
)
def test_where_nothing_is_private_a_client_s_file_is_the_server_s_model(
    method: str, codec: str, tmp_path: Path
) -> None:
    """As it arrived there: with a lossy codec near to it, and nearer than one round's training."""
    task = TrainingTask(rounds=2)
    before: list[dict[str, Tensor]] = []

    def loaded(model: nn.Module, client: int, server_round: int) -> None:
        if (client, server_round) == (0, task.rounds):
            before.append({k: v.clone() for k, v in fedpara.to_dense(model).state_dict().items()})

    paths = {"checkpoint": tmp_path / "server.safetensors", "client_checkpoints": tmp_path / "own"}
    _federate(task, method, codec, Hooks(loaded=loaded), **paths)
    server = load_file(paths["checkpoint"])
    moved = max(float((server[k] - v).abs().max()) for k, v in before[0].items())
    for client in range(task.clients):
        own = load_file(tmp_path / "own" / f"client-{client}.safetensors")
        assert own.keys() == server.keys()
        off = max(float((own[key] - value).abs().max()) for key, value in server.items())
        assert off < moved / 2 if codec == "small" else off <= 1e-6


def test_with_everything_off_clients_write_no_file(tmp_path: Path) -> None:
    paths = {"checkpoint": tmp_path / "server.safetensors", "client_checkpoints": tmp_path / "own"}
    _federate(TrainingTask(rounds=1, epochs=1), "none", "none", **paths)
    assert [path.name for path in tmp_path.iterdir()] == ["server.safetensors"]


def test_a_relative_path_is_said_with_where_it_leads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"checkpoint": "a.safetensors", "ledger": "b.jsonl", "state_dir": "c"}
    paths = {name: Path("out") / path for name, path in names.items()}
    paths["client_checkpoints"] = tmp_path / "own"
    outcome = _federate(TrainingTask(rounds=1, epochs=1), "pfedpara", "int8", **paths)
    told = [line for line in outcome.log if "is relative" in line]
    assert len(told) == len(names)  # the absolute one is not spoken of
    for name, path in names.items():
        line = next(line for line in told if f"fedpara: {name.replace('_', '-')} = " in line)
        assert f"on the server {tmp_path / 'out' / path}" in line
        assert (tmp_path / "out" / path).exists()
        assert ("on each client" in line) == (name == "state_dir")
    written = [line for line in outcome.log if "checkpoint of the server's model written" in line]
    assert written[0].endswith(str(tmp_path / "out" / "a.safetensors"))


def test_without_paths_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _federate(TrainingTask(rounds=1, epochs=1), "pfedpara", "int8")
    assert not list(tmp_path.iterdir())
