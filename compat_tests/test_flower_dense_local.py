"""Clients that train an ordinary dense model and send factors: ``local = "dense"`` on Flower."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context
from flwr.clientapp import mod
from flwr.serverapp import ServerApp
from safetensors.torch import load_file
from torch import Tensor, nn

import fedpara_plugins as fedpara
import fedpara_plugins.layers.base as base
import fedpara_plugins_flower as flower_side
from fedpara_plugins.ledger import LayerSize, LedgerEntry, read_lines
from fedpara_plugins_flower.messages.records import carried_payload
from harness.cells.flower import GAMMA
from harness.cells.strategies import STRATEGIES
from harness.flower.apps import Apps, Experiment, Hooks, Outcome, federate, plugin_apps
from harness.flower.legacy_apps import LegacyExperiment, legacy_plugin_apps
from harness.oracles.dense_local import descend_dense
from harness.oracles.descriptions import decode_payload
from harness.oracles.plain_loop import RULES, PlainResult, run_plain_loop
from harness.oracles.private_start import fix_private_start
from harness.oracles.task import TrainingTask

State = dict[str, Tensor]

TASK = TrainingTask(rounds=3, epochs=1)
CONVERTING = ("lowrank", "fedpara", "pfedpara")
BOTH, APP = frozenset({"net", "app"}), frozenset({"app"})


def _section(method: str = "fedpara", codec: str = "none", **options: Any) -> dict[str, Any]:
    chosen = {"method": method, "codec": codec, "gamma": GAMMA, "local": "dense", **options}
    return {f"fedpara.{key.replace('_', '-')}": value for key, value in chosen.items()}


def _build(task: TrainingTask, method: str, private: tuple[str, ...] = ()) -> nn.Module:
    net = task.net()
    # A private start whose norms differ looks trained.
    model = fedpara.convert(net, method=method, gamma=GAMMA, private=private, trained="discard")
    if private:  # which every client starts from values that it derives by itself
        model.load_state_dict(fedpara.ModelSpec.of(model).initial_private(), strict=False)
    return model


def _loop(
    task: TrainingTask, strategy: str, method: str, private: tuple[str, ...] = ()
) -> PlainResult:
    spec = STRATEGIES[strategy]
    return run_plain_loop(
        task,
        partial(_build, task, method, private),
        RULES[spec.rule](**spec.rule_options),
        proximal_mu=spec.proximal_mu,
        private_names=tuple(fedpara.split(_build(task, method, private)).private),
        training=descend_dense,
    )


def _distance(a: State, b: State, keys: Any) -> float:
    return float(sum(((a[key].double() - b[key].double()) ** 2).sum() for key in keys) ** 0.5)


def _check_near(outcome: Outcome, plain: PlainResult, tolerance: float) -> None:
    shared = [key for key in plain.state if key not in next(iter(plain.private.values()), {})]
    assert set(outcome.state) == set(plain.state)
    moved = _distance(plain.state, plain.initial, shared)
    assert moved > 0.1
    assert _distance(outcome.state, plain.state, shared) < tolerance * moved


# What the server gets ---------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize("method", CONVERTING)
@pytest.mark.parametrize(
    ("strategy", "model"),
    [
        ("fedavg", "groupnorm"),
        ("fedavg", "batchnorm"),
        ("fedprox", "groupnorm"),
        ("fedadam", "groupnorm"),
        ("fedmedian", "groupnorm"),
    ],
)
def test_a_run_is_that_of_a_plain_loop(strategy: str, method: str, model: str) -> None:
    task = TrainingTask(rounds=3, epochs=1, model=model)
    outcome = federate(plugin_apps(Experiment(task, strategy)), _section(method))
    plain = _loop(task, strategy, method)
    # FedAdam divides by the square root of small second moments.
    _check_near(outcome, plain, 2e-2 if strategy == "fedadam" else 1e-3)
    if method != "pfedpara":  # whose server evaluates W1 alone
        assert outcome.losses == pytest.approx(plain.losses, rel=1e-2)
    # The control: training factors comes to others.
    factors = ["fc1.x1", "conv2.y1"]
    apart = _distance(plain.state, _loop_with_factors(task, strategy, method).state, factors)
    assert apart > 0.1 * _distance(plain.state, plain.initial, factors)


def _loop_with_factors(task: TrainingTask, strategy: str, method: str) -> PlainResult:
    spec = STRATEGIES[strategy]
    return run_plain_loop(
        task,
        partial(_build, task, method),
        RULES[spec.rule](**spec.rule_options),
        proximal_mu=spec.proximal_mu,
        private_names=tuple(fedpara.split(_build(task, method)).private),
    )


@pytest.mark.in_turn(every=3)
@pytest.mark.parametrize("method", CONVERTING)
def test_bytes_and_names_are_those_of_factor_training(method: str) -> None:
    """The very same without a codec; with one, entropy depends on the values a little."""

    def traffic(local: str, codec: str) -> list[tuple[Any, ...]]:
        outcome = federate(plugin_apps(Experiment(TASK)), _section(method, codec, local=local))
        found = []
        for sent in outcome.sent:
            for name, record in sent.arrays.items():
                payload = carried_payload(record)
                assert payload is not None
                names = (
                    () if codec != "none" else tuple(decode_payload(payload, limit=10**7).tensors)
                )
                found.append((sent.direction, sent.kind, sent.round, name, names, sent.array_bytes))
        return found

    dense, factors = traffic("dense", "none"), traffic("factors", "none")
    assert dense == factors
    assert any(row[0] == "up" for row in dense)
    sizes = [sum(row[-1] for row in traffic(local, "balanced")) for local in ("dense", "factors")]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


def test_the_ledger_is_that_of_factor_training(tmp_path: Path) -> None:
    found = []
    for local in ("dense", "factors"):
        path = tmp_path / f"{local}.jsonl"
        federate(plugin_apps(Experiment(TASK)), _section(local=local, ledger=str(path)))
        lines = read_lines(path)
        found.append([line for line in lines if isinstance(line, LedgerEntry | LayerSize)])
    assert found[0] == found[1]
    assert sum(isinstance(line, LedgerEntry) for line in found[0]) == 3 * 4 * 3


# What the client's code sees --------------------------------------------------------------------


class Watched:
    """What a client's model looked like whenever the app had it in its hands."""

    def __init__(self) -> None:
        self.seen: list[tuple[type, list[str], bool]] = []
        self.plain = list(TrainingTask().net().state_dict())

    def look(self, model: nn.Module, client: int, server_round: int) -> None:
        factorised = any(isinstance(m, base.FactorisedLayer) for m in model.modules())
        self.seen.append((type(model), list(model.state_dict()), factorised))

    @property
    def hooks(self) -> Hooks:
        return Hooks(loaded=self.look, trained=self.look, evaluated=self.look)

    def check(self, net: type) -> None:
        assert len(self.seen) == 3 * 3 * 4  # hooks, rounds, clients
        assert set(map(str, self.seen)) == {str((net, self.plain, False))}


@pytest.mark.in_turn
@pytest.mark.parametrize("method", CONVERTING)
@pytest.mark.parametrize("lines", [BOTH, APP], ids=["with Net", "without Net"])
def test_a_client_s_model_is_never_converted(method: str, lines: frozenset[str]) -> None:
    """With the line ``Net = fedpara.factorised(Net)``, or without it on the client."""
    watched = Watched()
    apps = plugin_apps(Experiment(TASK, hooks=watched.hooks), client=lines)
    outcome = federate(apps, _section(method))
    watched.check(TASK.net)
    _check_near(outcome, _loop(TASK, "fedavg", method), 1e-3)


def test_no_option_for_factors_acts_on_the_client() -> None:
    """``clip`` bounds gradients of factors; a dense model's training is the user's alone."""
    plain = federate(plugin_apps(Experiment(TASK)), _section(clip=0.001))
    free = federate(plugin_apps(Experiment(TASK)), _section())
    for name, value in free.state.items():
        assert torch.equal(plain.state[name], value)


def test_it_learns() -> None:
    task = TrainingTask(rounds=8, epochs=2, lr=0.2)
    outcome = federate(plugin_apps(Experiment(task)), _section(codec="balanced"))
    assert outcome.accuracies[-1] > 0.8 > 0.3 > outcome.accuracies[0]
    own = federate(plugin_apps(Experiment(task)), _section("pfedpara", codec="balanced"))
    assert own.client_accuracies[8] > 0.8


# Private state ----------------------------------------------------------------------------------


def test_private_factors_move_and_stay_on_the_device() -> None:
    outcome = federate(plugin_apps(Experiment(TASK)), _section("pfedpara"))
    plain = _loop(TASK, "fedavg", "pfedpara")
    private = set(plain.private[0])
    assert private
    for sent in outcome.sent:
        for record in sent.arrays.values():
            assert not private & set(decode_payload(carried_payload(record), limit=10**7).tensors)
    assert outcome.client_accuracies[3] == pytest.approx(plain.client_accuracy, abs=0.02)
    apart = [plain.private[0][k] - plain.private[1][k] for k in private]
    assert max(float(value.abs().max()) for value in apart) > 1e-3


def test_a_private_head_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fix_private_start(monkeypatch)
    outcome = federate(plugin_apps(Experiment(TASK)), _section(private="fc2.*", trained="discard"))
    _check_near(outcome, _loop(TASK, "fedavg", "fedpara", ("fc2.*",)), 1e-3)


def test_checkpoints_are_dense_models(tmp_path: Path) -> None:
    section = _section(
        "pfedpara",
        checkpoint=str(tmp_path / "server.safetensors"),
        client_checkpoints=str(tmp_path),
    )
    federate(plugin_apps(Experiment(TASK)), section)
    states = [
        load_file(tmp_path / f"{name}.safetensors") for name in ("server", "client-0", "client-1")
    ]
    for state in states:
        TASK.net().load_state_dict(state, strict=True)
    assert not torch.equal(states[1]["fc1.weight"], states[2]["fc1.weight"])


# What goes wrong --------------------------------------------------------------------------------


def test_a_client_that_does_not_train_answers_the_very_factors() -> None:
    hooks = Hooks(train=lambda model, client, server_round: None)
    outcome = federate(plugin_apps(Experiment(TASK, hooks=hooks)), _section())
    torch.manual_seed(TASK.seed)
    first = _build(TASK, "fedpara").state_dict()
    down, up = (
        [s for s in outcome.sent if s.direction == d and s.kind == "train"] for d in ("down", "up")
    )
    assert len(up) == 12
    for sent in up:
        (record,) = sent.arrays.values()
        answer = decode_payload(carried_payload(record), limit=10**7).tensors
        for name, value in answer.items():
            torch.testing.assert_close(value, first[name], rtol=0, atol=1e-6)
            if sent.round == 1:
                assert torch.equal(value, first[name])
    assert down


def test_nan_is_one_client_s_own_misfortune() -> None:
    def trained(model: nn.Module, client: int, server_round: int) -> None:
        if client == 1:
            with torch.no_grad():
                model.fc1.weight[0, 0] = float("nan")

    outcome = federate(plugin_apps(Experiment(TASK, hooks=Hooks(trained=trained))), _section())
    reasons = [s.message.error.reason for s in outcome.sent if s.message.has_error()]
    assert len(reasons) == 3
    for reason in reasons:  # by the name that the client's own code knows
        assert "'fc1.weight' holds 1 NaN or infinite values" in reason
    assert len(outcome.losses) == 4
    assert outcome.losses[-1] < outcome.losses[0]
    assert not any(value.isnan().any() for value in outcome.state.values())


def test_other_options_on_one_side_are_told() -> None:
    for client, words in (
        ({"gamma": 0.9}, ["conv2.weight", "rank"]),
        ({"method": "lowrank"}, ["lowrank"]),
    ):
        outcome = federate(
            plugin_apps(Experiment(TASK)),
            _section(),
            client_config=_section(**client),
            raises=False,
        )
        for word in words:
            assert word in str(outcome.error)


def test_without_the_client_s_model_at_hand_methods_and_private_names_are_compared() -> None:
    apps = plugin_apps(Experiment(TASK), client=APP)
    for client, words in (
        ({"method": "pfedpara"}, "method fedpara"),
        ({"private": "fc2.*"}, "keeps 'fc2.weight'"),
    ):
        outcome = federate(apps, _section(), client_config=_section(**client), raises=False)
        assert words in str(outcome.error)
    # Either side may train what it likes.
    one = federate(apps, _section(local="factors"), client_config=_section())
    other = federate(apps, _section())
    for name, value in one.state.items():
        assert torch.equal(value, other.state[name])


@pytest.mark.parametrize("strategy", [flower_side.Scaffold, flower_side.FedDyn])
def test_variates_and_duals_are_refused_before_anything_is_sent(strategy: Any) -> None:
    from flwr.app import ConfigRecord

    def server(outcome: Outcome) -> ServerApp:
        app = flower_side.server_app(ServerApp())

        @app.main()
        def main(grid: Any, context: Context) -> None:
            model = flower_side.factorised(TASK.net)()
            strategy().start(
                grid=grid,
                initial_arrays=ArrayRecord(model.state_dict()),
                num_rounds=2,
                train_config=ConfigRecord({"lr": 0.1}),
            )

        return app

    apps = Apps(plugin_apps(Experiment(TASK)).client, server, TASK.clients)
    outcome = federate(apps, _section(), raises=False)
    assert "local='dense'" in str(outcome.error)
    assert "Set local='factors'" in str(outcome.error)
    assert outcome.sent == []


@pytest.mark.parametrize("strategy", ["dpclientfixed"])
def test_clipping_on_the_clients_is_refused(strategy: str) -> None:
    outcome = federate(plugin_apps(Experiment(TASK, strategy)), _section(), raises=False)
    assert "rescales them afterwards" in str(outcome.error)
    assert outcome.sent == []


def test_local_noise_is_refused_by_the_clients() -> None:
    noise = mod.LocalDpMod(1.0, 1.0, 1.0, 1e-5)
    outcome = federate(plugin_apps(Experiment(TASK, mods=(noise,))), _section(), raises=False)
    assert "rescales them afterwards" in str(outcome.error)


# The legacy API ---------------------------------------------------------------------------------


def _legacy(method: str, **options: Any) -> tuple[Outcome, Watched]:
    watched = Watched()
    task = options.pop("task", TrainingTask(clients=2, rounds=2, epochs=1))
    experiment = LegacyExperiment(task, hooks=Hooks(loaded=watched.look), **options)
    section = _section(method, init="seeded")
    outcome = federate(legacy_plugin_apps(experiment), section)
    assert watched.seen
    assert {factorised for _, _, factorised in watched.seen} == {False}
    return outcome, watched


def _carried(outcome: Outcome, direction: str, server_round: int) -> list[State]:
    return [
        decode_payload(carried_payload(record), limit=10**7).tensors
        for sent in outcome.sent
        if (sent.direction, sent.kind, sent.round) == (direction, "train", server_round)
        for record in sent.arrays.values()
    ]


def _seeded(task: TrainingTask, method: str) -> nn.Module:
    return fedpara.convert(task.net(), method=method, gamma=GAMMA, init="seeded")


@pytest.mark.in_turn
@pytest.mark.parametrize("part", ["state", "parameters"])
@pytest.mark.parametrize("method", CONVERTING)
def test_an_app_of_the_legacy_api_is_the_same_plain_loop(method: str, part: str) -> None:
    task = TrainingTask(clients=2, rounds=2, epochs=1)
    outcome, _ = _legacy(method, part=part)
    plain = run_plain_loop(
        task,
        partial(_seeded, task, method),
        RULES["fedavg"](),
        private_names=tuple(fedpara.split(_seeded(task, method)).private),
        training=descend_dense,
    )
    _check_near(outcome, plain, 1e-3)


@pytest.mark.in_turn
@pytest.mark.parametrize("part", ["state", "parameters"])
@pytest.mark.parametrize("method", CONVERTING)
@pytest.mark.parametrize("model", ["groupnorm", "batchnorm"])
def test_a_client_is_asked_for_the_first_weights(method: str, part: str, model: str) -> None:
    """It gives factors, of which its own plain model holds the composed weights."""
    task = TrainingTask(clients=2, rounds=2, epochs=1, model=model)
    outcome, _ = _legacy(method, task=task, part=part, initial=False, evaluate_fn=False)
    seeded = _seeded(task, method)
    shared = fedpara.split(seeded).shared
    names = set(shared) if part == "state" else set(shared) & dict(seeded.named_parameters()).keys()
    first, last = _carried(outcome, "down", 1), _carried(outcome, "up", 2)
    assert len(first) == len(last) == 2
    for state in first:
        assert set(state) == names
        assert torch.equal(state["fc1.x1"], shared["fc1.x1"])
        assert torch.equal(state["conv2.t1"], shared["conv2.t1"])
    for state in last:
        assert set(state) == names
        assert not torch.equal(state["fc1.x1"], shared["fc1.x1"])
