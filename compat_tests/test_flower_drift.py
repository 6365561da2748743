"""Scaffold and FedDyn in a Flower app, against the published algorithms in plain torch."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

import fedpara_plugins as core
import fedpara_plugins_flower as fedpara
from fedpara_plugins_flower.strategies.client_state import open_correction_state
from harness.cells.flower import GAMMA
from harness.flower.apps import Outcome, federate
from harness.flower.drift_apps import DriftExperiment, drift_apps
from harness.flower.inprocess_grid import InProcessGrid, Sent
from harness.oracles.cell_model import SLOW, cell_model
from harness.oracles.descriptions import decode_payload
from harness.oracles.drift import DriftResult, feddyn, scaffold
from harness.oracles.task import TrainingTask, train

TOLERANCE = 1e-4
"""Of a weight to the plain loop, over five rounds. float32 on both sides, and what is corrected by
differences of weights raises their rounding: up to 2.3e-5 was seen. A wrong sign, share or round of
a variate is off by 1e-2."""

ALPHA = 0.3
PUBLISHED: dict[str, Any] = {"guard": None}
METHODS = ("none", "fedpara", "pfedpara")


def _build(method: str, model: str = "groupnorm") -> nn.Module:
    """Build a model that trains without a clip, as the papers' algorithms have none."""
    return cell_model(method, model, **SLOW, clip="none")


def _private(method: str, model: str = "groupnorm") -> frozenset[str]:
    return core.ModelSpec.of(_build(method, model)).private_keys


def _section(method: str, codec: str = "none", **more: Any) -> dict[str, Any]:
    return {
        "fedpara.method": method,
        "fedpara.codec": codec,
        "fedpara.gamma": GAMMA,
        **{f"fedpara.{key}": value for key, value in {**SLOW, **more}.items()},
    }


def _participants(outcome: Outcome, rounds: int) -> list[list[int]]:
    asked = [s for s in outcome.sent if (s.direction, s.kind) == ("down", "train")]
    return [[s.partition for s in asked if s.round == r] for r in range(1, rounds + 1)]


def _run(
    strategy: Any,
    method: str = "none",
    codec: str = "none",
    *,
    mods: bool = True,
    task: TrainingTask | None = None,
    **options: Any,
) -> tuple[Outcome, DriftExperiment]:
    losses = options.get("option") == "I"
    experiment = DriftExperiment(
        strategy, {**PUBLISHED, **options}, task or TrainingTask(), losses=losses
    )
    apps = drift_apps(experiment, mods=mods)
    return federate(apps, _section(method, codec)), experiment


def _choice(algorithm: str) -> tuple[Any, dict[str, Any]]:
    options = PUBLISHED if algorithm == "scaffold" else {**PUBLISHED, "alpha": ALPHA}
    return {"scaffold": fedpara.Scaffold, "feddyn": fedpara.FedDyn}[algorithm], options


def _plain(
    algorithm: str, task: TrainingTask, method: str, weights: Any = lambda client: 1.0
) -> DriftResult:
    build = partial(_build, method, task.model)
    if algorithm == "scaffold":
        return scaffold(task, build, private_names=_private(method), weights=weights)
    return feddyn(task, build, alpha=ALPHA, private_names=_private(method), weights=weights)


def _own(outcome: Outcome, experiment: DriftExperiment, partition: int) -> dict[str, Tensor]:
    """Return what a client keeps, as far as the server has it; {} for zeros."""
    context = SimpleNamespace(
        state=outcome.grid.client_state(partition),
        node_config={"partition-id": partition},
        run_config={},
    )
    with open_correction_state(context, experiment.made.algorithm, None) as state:  # type: ignore[arg-type]
        kept = state.correction
    accepted = experiment.made.sums.accepted(outcome.grid.node_id(partition))
    assert accepted in (kept.confirmed_round, kept.pending_round)
    return (kept.pending if accepted == kept.pending_round else kept.confirmed) or {}


def _assert_mean_of_own(outcome: Outcome, experiment: DriftExperiment) -> None:
    """Assert that c, or h, is the mean of what the clients keep."""
    clients = experiment.task.clients
    own = [_own(outcome, experiment, partition) for partition in range(clients)]
    assert sum(map(bool, own)) >= 2
    for key, value in experiment.made.sums.mean(clients).items():
        mean = sum(state[key].double() for state in own if state) / clients
        assert float(value.abs().max()) > 0
        assert float((value - mean).abs().max()) <= 2e-6 * max(1.0, float(mean.abs().max())), key


def _distance(a: dict[str, Tensor], b: dict[str, Tensor], names: Any) -> float:
    return float(sum(((a[k].double() - b[k].double()) ** 2).sum() for k in names) ** 0.5)


def _loop(make: Any) -> Any:
    """Return a training loop with the optimizer that ``make`` builds."""

    def run(model: nn.Module, client: int, server_round: int) -> None:
        optimizer = make(model.parameters())
        for images, labels in TrainingTask().batches(client, server_round):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return run


def _assert_published(
    outcome: Outcome, experiment: DriftExperiment, plain: DriftResult, private: frozenset[str]
) -> None:
    assert outcome.state.keys() == plain.state.keys()
    for key, value in outcome.state.items():
        assert value.dtype == plain.initial[key].dtype, key
        if key not in private:
            assert float((value.double() - plain.state[key]).abs().max()) <= TOLERANCE, key
    mean = experiment.made.sums.mean(experiment.task.clients)
    assert mean.keys() == plain.mean.keys()
    assert not mean.keys() & private
    for key, value in mean.items():
        assert float(plain.mean[key].abs().max()) > 0, key
        assert float((value - plain.mean[key]).abs().max()) <= 50 * TOLERANCE, key
    assert outcome.losses == pytest.approx(plain.losses, abs=1e-3)
    assert not [line for line in outcome.log if "left out" in line]


@pytest.mark.in_turn
@pytest.mark.scaffold
@pytest.mark.parametrize("option", ["I", "II"])
@pytest.mark.parametrize("method", METHODS)
def test_scaffold_is_the_published_algorithm(method: str, option: Any) -> None:
    """Half of the clients a round, many local steps, a server rate that is not 1."""
    task = TrainingTask(rounds=5)
    outcome, experiment = _run(
        fedpara.Scaffold, method, task=task, fraction_train=0.5, option=option, server_rate=0.8
    )
    chosen = _participants(outcome, task.rounds)
    assert {len(clients) for clients in chosen} == {2}
    assert len({tuple(clients) for clients in chosen}) > 1
    plain = scaffold(
        task,
        partial(_build, method),
        private_names=_private(method),
        participants=chosen,
        option=option,
        rate=0.8,
    )
    _assert_published(outcome, experiment, plain, _private(method))


@pytest.mark.feddyn
@pytest.mark.parametrize("method", METHODS)
def test_feddyn_is_the_published_algorithm(method: str) -> None:
    task = TrainingTask(rounds=5)
    outcome, experiment = _run(fedpara.FedDyn, method, task=task, fraction_train=0.5, alpha=ALPHA)
    chosen = _participants(outcome, task.rounds)
    assert {len(clients) for clients in chosen} == {2}
    plain = feddyn(
        task,
        partial(_build, method),
        alpha=ALPHA,
        private_names=_private(method),
        participants=chosen,
    )
    _assert_published(outcome, experiment, plain, _private(method))


# Models, weights, chains -------------------------------------------------------------------------


@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_batchnorm_buffers_are_averaged_and_have_no_variates(algorithm: str) -> None:
    task = TrainingTask(model="batchnorm")
    strategy, options = _choice(algorithm)
    outcome, experiment = _run(strategy, "fedpara", task=task, **options)
    plain = _plain(algorithm, task, "fedpara")
    _assert_published(outcome, experiment, plain, frozenset())
    buffers = {name for name, _ in task.net().named_buffers()}
    assert len(buffers) == 6
    assert not buffers & experiment.made.sums.total.keys()


@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_clients_count_by_their_examples_if_asked_to(algorithm: str) -> None:
    strategy, options = _choice(algorithm)
    outcome, experiment = _run(strategy, weighting="examples", **options)
    task = TrainingTask()
    assert len({task.size(client) for client in range(4)}) == 4
    _assert_published(outcome, experiment, _plain(algorithm, task, "none", task.size), frozenset())
    uniform = _plain(algorithm, task, "none")
    off = max(float((v - uniform.state[k]).abs().max()) for k, v in outcome.state.items())
    assert off > 10 * TOLERANCE


@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_without_the_mod_in_the_chain_it_is_the_same_run(algorithm: str) -> None:
    strategy, options = _choice(algorithm)
    with_mod, _ = _run(strategy, "none", **options)
    without, _ = _run(strategy, "none", mods=False, **options)
    assert all(torch.equal(value, without.state[k]) for k, value in with_mod.state.items())


@pytest.mark.scaffold
@pytest.mark.feddyn
def test_with_another_strategy_the_clients_lines_do_nothing() -> None:
    corrected = DriftExperiment(FedAvg)
    plain = DriftExperiment(FedAvg, corrects=frozenset())
    one, other = (federate(drift_apps(e), _section("none")) for e in (corrected, plain))
    assert all(torch.equal(value, other.state[k]) for k, value in one.state.items())
    assert [list(s.content) for s in one.sent] == [list(s.content) for s in other.sent]


# Equivalences ------------------------------------------------------------------------------------


@pytest.mark.scaffold
def test_scaffold_of_one_client_is_fedavg() -> None:
    """c is then that client's own variate, and the correction zero in every round."""
    alone = {"min_train_nodes": 1, "min_evaluate_nodes": 1, "min_available_nodes": 1}
    task = TrainingTask(clients=1)
    outcome, experiment = _run(fedpara.Scaffold, "fedpara", task=task, **alone)
    assert any(float(v.abs().max()) > 1e-3 for v in experiment.made.sums.total.values())
    fedavg = federate(drift_apps(DriftExperiment(FedAvg, alone, task)), _section("fedpara"))
    for key, value in outcome.state.items():
        assert float((value - fedavg.state[key]).abs().max()) <= TOLERANCE, key


@pytest.mark.scaffold
def test_scaffold_that_only_collects_is_fedavg() -> None:
    """Zero variates, so to speak, for all rounds; weighted as FedAvg does it."""
    guard = fedpara.Guard(tau=1e9, collect=100)
    outcome, experiment = _run(fedpara.Scaffold, guard=guard, weighting="examples")
    assert experiment.made.sums.total
    fedavg = federate(drift_apps(DriftExperiment(FedAvg)), _section("none"))
    for key, value in outcome.state.items():
        assert float((value - fedavg.state[key]).abs().max()) <= 5e-6, key


@pytest.mark.feddyn
def test_feddyns_first_round_is_fedprox_with_a_longer_step() -> None:
    """Duals are zero: clients do FedProx's steps; h, taken in first, adds |P|/m of the update."""
    task = TrainingTask(rounds=1)
    outcome, _ = _run(fedpara.FedDyn, "fedpara", task=task, fraction_train=0.5, alpha=ALPHA)
    (chosen,) = _participants(outcome, 1)
    torch.manual_seed(task.seed)
    model = _build("fedpara")
    x = {k: v.clone() for k, v in model.state_dict().items()}
    mean = {k: torch.zeros_like(v) for k, v in x.items()}
    for client in chosen:
        model.load_state_dict(x)
        train(model, task.batches(client, 1), lr=task.lr, proximal_mu=ALPHA)
        mean = {k: v + model.state_dict()[k] / len(chosen) for k, v in mean.items()}
    for key, value in outcome.state.items():
        longer = x[key] + (1 + len(chosen) / 4) * (mean[key] - x[key])
        assert float((value - longer).abs().max()) <= TOLERANCE, key


# Codecs and the wire -----------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("codec", ["int8", "balanced", "small"])
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_whatever_a_codec_loses_the_servers_mean_is_that_of_the_clients(
    algorithm: str, codec: str
) -> None:
    strategy, options = _choice(algorithm)
    outcome, experiment = _run(
        strategy, "fedpara", codec, task=TrainingTask(rounds=5), fraction_train=0.5, **options
    )
    _assert_mean_of_own(outcome, experiment)


@pytest.mark.in_turn
@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("codec", ["int8", "balanced"])
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_a_codec_ends_near_the_uncoded_run(algorithm: str, codec: str) -> None:
    strategy, options = _choice(algorithm)
    coded, experiment = _run(strategy, "fedpara", codec, **options)
    plain = _plain(algorithm, TrainingTask(), "fedpara")
    names = experiment.made.sums.total
    way = _distance(plain.state, plain.initial, names)
    assert _distance(coded.state, plain.state, names) <= 0.1 * way
    assert coded.accuracies[-1] >= plain.accuracies[-1] - 0.05
    # int8 takes a byte a value, and 'balanced' less than that; both records count.
    later = [s for s in coded.sent if s.kind == "train" and s.round == 3 and s.direction == "up"]
    assert all(len(s.arrays) == (2 if algorithm == "scaffold" else 1) for s in later)
    values = sum(v.numel() for v in names.values())
    assert all(s.array_bytes <= 1.2 * len(s.arrays) * values + 4000 for s in later)


@pytest.mark.scaffold
def test_private_names_have_no_variates_on_the_wire() -> None:
    outcome, experiment = _run(fedpara.Scaffold, "pfedpara", task=TrainingTask(rounds=2))
    private = _private("pfedpara")
    assert private
    shared = set(_build("pfedpara").state_dict()) - private
    seen: set[str] = set()
    for sent in outcome.sent:
        for name, record in sent.arrays.items():
            if name != "arrays":
                payload = record["fedpara.payload"].numpy().tobytes()
                tensors = decode_payload(payload, limit=10**8).tensors
                assert tensors.keys() == shared, name
                seen.add(name)
    assert seen == {"fedpara.variate", "fedpara.update.variate"}
    for partition in range(4):
        assert _own(outcome, experiment, partition).keys() == shared


# What is lost ------------------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("remember", [True, False])
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_a_client_that_lost_its_state_is_noticed_and_taken_out(
    algorithm: str, remember: bool
) -> None:
    strategy, options = _choice(algorithm)
    experiment = DriftExperiment(
        strategy, {**options, "remember": remember}, TrainingTask(rounds=4)
    )

    def tap(sent: Sent, grid: InProcessGrid) -> None:
        if (sent.direction, sent.kind, sent.round) == ("down", "evaluate", 2):
            grid.lose_state(1)

    outcome = federate(drift_apps(experiment), _section("fedpara"), tap=tap)
    node = outcome.grid.node_id(1)
    lines = [line for line in outcome.log if "had lost its state" in line]
    assert len(lines) == 1
    assert f"node {node} " in lines[0]
    if remember:
        _assert_mean_of_own(outcome, experiment)
    else:
        # An average client was taken out, so the sum is off by that one's difference to it.
        with pytest.raises(AssertionError):
            _assert_mean_of_own(outcome, experiment)
    assert set(experiment.made.sums.rounds.values()) == {4}
    assert outcome.losses[-1] < outcome.losses[0]


@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_a_reply_that_never_arrives_is_undone_on_the_client(
    algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy, options = _choice(algorithm)
    experiment = DriftExperiment(strategy, options, TrainingTask(rounds=4))
    original = InProcessGrid.pull_messages

    def pull(self: InProcessGrid, message_ids: Any) -> Any:
        before = len(self.sent)
        replies = original(self, message_ids)
        made = [s for s in self.sent[before:] if s.direction == "up"]
        lost = {s.node for s in made if (s.kind, s.round, s.partition) == ("train", 2, 3)}
        return [reply for reply in replies if reply.metadata.src_node_id not in lost]

    monkeypatch.setattr(InProcessGrid, "pull_messages", pull)
    outcome = federate(drift_apps(experiment), _section("fedpara", "int8"))
    said = [line for line in outcome.log if "the server never had the reply of round 2" in line]
    assert len(said) == 1
    _assert_mean_of_own(outcome, experiment)


@pytest.mark.in_turn
@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("mods", [True, False])
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_nan_of_one_client_costs_that_client_its_round(algorithm: str, mods: bool) -> None:
    strategy, options = _choice(algorithm)
    task = TrainingTask()

    def spoil(model: nn.Module, client: int, server_round: int) -> None:
        lr = 1e30 if (client, server_round) == (2, 2) else task.lr
        train(model, task.batches(client, server_round), lr=lr)

    experiment = DriftExperiment(strategy, options, task, train=spoil)
    outcome = federate(drift_apps(experiment, mods=mods), _section("none"))
    node = outcome.grid.node_id(2)
    left_out = [line for line in outcome.log if "left out" in line]
    assert len(left_out) == 1
    assert f"node {node}:" in left_out[0]
    assert all(bool(torch.isfinite(v).all()) for v in outcome.state.values())
    assert outcome.losses[-1] < outcome.losses[0]
    _assert_mean_of_own(outcome, experiment)


# The guard ---------------------------------------------------------------------------------------


@pytest.mark.scaffold
def test_the_guard_collects_first_and_bounds_what_is_too_large() -> None:
    task = TrainingTask(rounds=4)
    options = {"guard": fedpara.Guard(tau=1.5, collect=1)}

    def exaggerate(model: nn.Module, client: int, server_round: int) -> None:
        lr = 6 * task.lr if (client, server_round) == (1, 3) else task.lr
        train(model, task.batches(client, server_round), lr=lr)

    experiment = DriftExperiment(fedpara.Scaffold, options, task, train=exaggerate)
    outcome = federate(drift_apps(experiment), _section("none"))
    tasks = [
        (s.round, s.content["fedpara.optimizer"])
        for s in outcome.sent
        if (s.direction, s.kind) == ("down", "train")
    ]
    assert {r for r, record in tasks if not record["correct"]} == {1}
    assert {r for r, record in tasks if not record["bound"]} == {1}
    bound = next(record["bound"] for r, record in tasks if r == 3)
    replies = [s for s in outcome.sent if (s.direction, s.kind) == ("up", "train")]
    reports = {(s.round, s.partition): s.content["fedpara.optimizer"] for s in replies}
    kept, norm = reports[3, 1]["kept"], reports[3, 1]["norm"]
    assert norm > bound
    assert kept == pytest.approx(bound / norm)
    assert [line for line in outcome.log if "the guard bounded" in line]
    assert [line for line in outcome.log if "only collects" in line]
    _assert_mean_of_own(outcome, experiment)


@pytest.mark.scaffold
def test_the_guard_is_on_by_default_and_off_it_is_silent() -> None:
    assert fedpara.Scaffold().guard == fedpara.Guard(tau=1.5, window=50, collect=None)
    outcome, _ = _run(fedpara.Scaffold, guard=None)
    assert not [line for line in outcome.log if "the guard" in line]


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("mods", [True, False])
@pytest.mark.parametrize("corrects", [frozenset(), frozenset({"context"})])
def test_a_client_without_the_lines_ends_the_run_with_the_lines(
    corrects: frozenset[str], mods: bool
) -> None:
    experiment = DriftExperiment(fedpara.Scaffold, PUBLISHED, corrects=corrects)
    with pytest.raises(core.ConfigError, match=r"correction\.add_to"):
        federate(drift_apps(experiment, mods=mods), _section("none"))


@pytest.mark.in_turn
@pytest.mark.scaffold
@pytest.mark.parametrize("mods", [True, False])
@pytest.mark.parametrize(
    ("make", "word"),
    [
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), "momentum=0.9"),
        (torch.optim.Adam, "Adam"),
    ],
)
def test_scaffold_refuses_what_is_not_plain_sgd(make: Any, word: str, mods: bool) -> None:
    experiment = DriftExperiment(fedpara.Scaffold, PUBLISHED, train=_loop(make))
    with pytest.raises(core.FedParaError, match=f"plain SGD.*{word}"):
        federate(drift_apps(experiment, mods=mods), _section("none"))


@pytest.mark.feddyn
def test_feddyn_takes_any_optimizer() -> None:
    make = partial(torch.optim.Adam, lr=0.003)
    experiment = DriftExperiment(fedpara.FedDyn, {"alpha": ALPHA}, train=_loop(make))
    outcome = federate(drift_apps(experiment), _section("fedpara"))
    assert outcome.losses[-1] < 0.8 * outcome.losses[0]


@pytest.mark.scaffold
def test_option_i_without_a_pass_over_the_data_says_what_to_pass() -> None:
    experiment = DriftExperiment(fedpara.Scaffold, {**PUBLISHED, "option": "I"})
    with pytest.raises(core.FedParaError, match="losses=lambda"):
        federate(drift_apps(experiment), _section("none"))


# The server's own state --------------------------------------------------------------------------


@pytest.mark.scaffold
@pytest.mark.feddyn
@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_a_strategys_state_goes_into_another_one(algorithm: str) -> None:
    strategy, options = _choice(algorithm)
    guarded = {**options, "guard": fedpara.Guard(), "remember": True}
    _, experiment = _run(strategy, **guarded)
    again = strategy(**guarded)
    again.load_state_dict(experiment.made.state_dict())
    assert again.sums == experiment.made.sums
    assert again.sums.rounds
    assert str(again.state_dict()) == str(experiment.made.state_dict())
