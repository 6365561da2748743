"""Differential privacy by clipping: the bound, the noise, and which codecs are refused."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.client import mod as legacy_mods
from flwr.clientapp import mod
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

import fedpara_plugins_flower.privacy.clipping as clipping
from fedpara_plugins import FedParaError
from fedpara_plugins_flower.server.strategy_arrays import averageable
from harness.cells.flower import GAMMA
from harness.cells.strategies import STRATEGIES
from harness.flower.apps import Experiment, Outcome, federate, plugin_apps
from harness.matrix.checks import distance
from harness.oracles.cell_model import cell_model
from harness.oracles.plain_loop import RULES, run_plain_loop
from harness.oracles.task import TrainingTask

CLIP = 0.05
"""Well below the norm of an update of one epoch, which is about 1."""

TASK = TrainingTask(rounds=1, epochs=1)

CLIENT = ("dpclientfixed", "dpclientadaptive")
SERVER = ("dpserverfixed", "dpserveradaptive")


def _bound(strategy: str, clip: float = CLIP) -> dict[str, float]:
    return {"initial_clipping_norm" if "adaptive" in strategy else "clipping_norm": clip}


def _run(
    strategy: str,
    codec: str,
    *,
    method: str = "fedpara",
    task: TrainingTask = TASK,
    raises: bool = True,
    mods: tuple[Any, ...] | None = None,
    options: dict[str, float] | None = None,
    **more: str,
) -> Outcome:
    """Run with the strategy's ``options``, and ``more`` options of the plugin."""
    section = {
        "method": method,
        "codec": codec,
        **{k.replace("_", "-"): v for k, v in more.items()},
    }
    flat = {f"fedpara.{key}": value for key, value in section.items()}
    chosen = {**(_bound(strategy) if strategy.startswith("dp") else {}), **(options or {})}
    experiment = Experiment(task, strategy, chosen, mods=mods)
    return federate(plugin_apps(experiment), {"fedpara.gamma": GAMMA, **flat}, raises=raises)


def _initial(method: str) -> dict[str, Tensor]:
    torch.manual_seed(TASK.seed)
    return cell_model(method, TASK.model).state_dict()


def _distance(state: Mapping[str, Tensor], method: str) -> float:
    """Return the distance of the shared part from the first state; private factors are zero."""
    start = _initial(method)
    return distance(state, start, [key for key, value in state.items() if value.any()])


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """Collect the states that the server decodes from replies, before they are averaged."""
    seen: list[dict[str, Tensor]] = []
    original = FedAvg.aggregate_train

    def spy(self: FedAvg, server_round: int, replies: Iterable[Message]) -> Any:
        found = list(replies)
        seen.extend(reply.content.array_records["arrays"].to_torch_state_dict() for reply in found)
        return original(self, server_round, found)

    monkeypatch.setattr(FedAvg, "aggregate_train", spy)
    return seen


# The bound ---------------------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", ["none", "lossless"])
@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
@pytest.mark.parametrize("strategy", CLIENT)
def test_clipping_on_clients_bounds_every_update_without_loss(
    strategy: str, method: str, codec: str, updates: list[dict[str, Tensor]]
) -> None:
    outcome = _run(strategy, codec, method=method)
    assert len(updates) == TASK.clients
    norms = [_distance(update, method) for update in updates]
    assert max([*norms, _distance(outcome.state, method)]) <= CLIP * (1 + 1e-5)
    assert min(norms) > CLIP / 5  # the clip bounds them, they are not empty


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", ["int8", "balanced", "small"])
@pytest.mark.parametrize("strategy", SERVER)
def test_clipping_on_the_server_bounds_every_update_with_a_lossy_codec(
    strategy: str, codec: str, updates: list[dict[str, Tensor]]
) -> None:
    outcome = _run(strategy, codec)
    norms = [_distance(update, "fedpara") for update in updates]
    assert len(norms) == TASK.clients
    assert max([*norms, _distance(outcome.state, "fedpara")]) <= CLIP * (1 + 1e-5)
    assert min(norms) > CLIP / 5


def test_without_clipping_updates_are_larger(updates: list[dict[str, Tensor]]) -> None:
    _run("fedavg", "none")
    assert min(_distance(update, "fedpara") for update in updates) > 4 * CLIP


@pytest.mark.parametrize("codec", ["int8", "small"])
def test_a_lossy_codec_after_the_clip_breaks_the_bound(
    codec: str, updates: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Why it is refused: this is what comes of it otherwise."""
    monkeypatch.setattr(clipping, "_check_lossless", lambda *_: None)
    _run("dpclientfixed", codec)
    assert max(_distance(update, "fedpara") for update in updates) > CLIP * (1 + 1e-5)


# Refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "more"),
    [
        ("int8", {}),
        ("balanced", {}),
        ("small", {}),
        ("none", {"uplink_codec": "delta+feedback+quantise:bits=4"}),
        ("lossless", {"downlink_codec": "int8"}),
        ("lossless", {"references": "grid"}),
    ],
)
@pytest.mark.parametrize("strategy", CLIENT)
def test_a_lossy_codec_after_the_clip_is_refused_before_anything_is_sent(
    strategy: str, codec: str, more: dict[str, str]
) -> None:
    outcome = _run(strategy, codec, raises=False, **more)
    assert isinstance(outcome.error, FedParaError)
    assert "clips updates on the clients" in str(outcome.error)
    assert "lossless" in str(outcome.error)
    assert not outcome.sent


LOCAL = mod.LocalDpMod(clipping_norm=CLIP, sensitivity=1e-6, epsilon=1.0, delta=0.1)


def _wrapped(message: Message, context: Any, call_next: Any) -> Message:
    return LOCAL(message, context, call_next)


_wrapped.__wrapped__ = LOCAL  # type: ignore[attr-defined]


LEGACY = legacy_mods.LocalDpMod(clipping_norm=CLIP, sensitivity=1e-6, epsilon=1.0, delta=0.1)


@pytest.mark.in_turn
@pytest.mark.parametrize(
    "local",
    [LOCAL, functools.partial(LOCAL), _wrapped, LEGACY],
    ids=["mod", "partial", "wrapped", "legacy"],
)
@pytest.mark.parametrize("codec", ["int8", "small"])
def test_clients_refuse_local_privacy_before_a_lossy_codec(codec: str, local: Any) -> None:
    """The server cannot know of it: the clients refuse before they train, and the run ends."""
    outcome = _run("fedavg", codec, mods=(local,), raises=False)
    assert isinstance(outcome.error, FedParaError)
    assert "LocalDpMod clips updates" in str(outcome.error)
    assert all(sent.message.has_error() for sent in outcome.sent if sent.direction == "up")


@pytest.mark.parametrize("codec", ["none", "lossless"])
def test_local_privacy_without_loss_keeps_its_bound(
    codec: str, updates: list[dict[str, Tensor]]
) -> None:
    _run("fedavg", codec, mods=(LOCAL,))  # whose noise, over all weights, adds some 2e-4
    norms = [_distance(update, "fedpara") for update in updates]
    assert len(norms) == TASK.clients
    assert CLIP / 5 < max(norms) <= CLIP * 1.01


def test_other_mods_are_not_refused() -> None:
    def passed(message: Message, context: Any, call_next: Any) -> Message:
        return call_next(message, context)  # type: ignore[no-any-return]

    outcome = _run("fedavg", "int8", mods=(passed, mod.arrays_size_mod))
    assert outcome.accuracies


# The noise ---------------------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", ["none", "lossless"])
@pytest.mark.parametrize("strategy", [*SERVER, *CLIENT])
def test_the_noise_is_that_of_the_seeded_generator(strategy: str, codec: str) -> None:
    """Computed here: deviation z c / n, one draw a tensor in order, after the count's noise."""
    options = {"noise_multiplier": 1.0}
    deviation = CLIP / TASK.clients
    generator = np.random.RandomState(TASK.seed)
    if "adaptive" in strategy:
        options["clipped_count_stddev"] = 2.0
        # All four were clipped; the norm moves before the noise is drawn.
        fraction = generator.normal(4, 2.0) / 4
        spec = STRATEGIES[strategy].options
        moved = CLIP * np.exp(-spec["clip_norm_lr"] * (fraction - spec["target_clipped_quantile"]))
        deviation = (1 - 1 / 16) ** -0.5 * moved / TASK.clients
    quiet = _run(strategy, codec).state
    noisy = _run(strategy, codec, options=options).state
    drawn = []
    for key, value in quiet.items():
        noise = generator.normal(0, deviation, tuple(value.shape))
        drawn.append(noise.ravel())
        np.testing.assert_allclose(noisy[key].numpy(), value.numpy() + noise, atol=1e-6)
    # Not only that generator's: of the scale that the mechanism promises, within 5 %.
    assert np.concatenate(drawn).std() == pytest.approx(deviation, rel=0.05)


# Integers ----------------------------------------------------------------------------------------


def test_integers_go_to_qfedavg_as_numbers_and_the_log_says_so() -> None:
    """Flower's own run dies on them; here the counters count as weights, and a line says it."""
    task = TrainingTask(model="batchnorm", rounds=2, epochs=1)
    experiment = Experiment(task, "qfedavg", {"client_learning_rate": task.lr})
    outcome = federate(plugin_apps(experiment), {"fedpara.codec": "lossless"})
    rule = RULES["qfedavg"](client_learning_rate=task.lr, q=STRATEGIES["qfedavg"].options["q"])
    plain = run_plain_loop(task, task.net, rule)
    for key, value in outcome.state.items():
        np.testing.assert_allclose(value.double(), plain.state[key], atol=5e-6, err_msg=key)
    said = [line for line in outcome.log if "num_batches_tracked" in line and "norm" in line]
    assert len(said) == 1
    assert 'private = "*num_batches_tracked"' in said[0]


def test_integers_are_no_news_for_a_mean() -> None:
    experiment = Experiment(TrainingTask(model="batchnorm", rounds=1, epochs=1))
    outcome = federate(plugin_apps(experiment), {"fedpara.codec": "lossless"})
    assert outcome.accuracies
    assert not [line for line in outcome.log if "integer tensors" in line]


def test_integers_that_float64_cannot_hold_stay_integers() -> None:
    tensors = {
        "count": torch.tensor(7),
        "flag": torch.tensor([True, False]),
        "seed": torch.tensor([2**53 + 1]),
        "weight": torch.ones(2),
    }
    found = averageable(tensors)
    assert [value.dtype for value in found.values()] == [
        torch.float64,
        torch.float64,
        torch.int64,
        torch.float32,
    ]
    assert all(bool((found[key] == value).all()) for key, value in tensors.items())
