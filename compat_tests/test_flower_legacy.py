"""Apps of Flower's legacy API (``NumPyClient``, ``server_fn``): lists of arrays without names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fedpara_plugins as fedpara
import fedpara_plugins.references.downlink as downlink
from fedpara_plugins.codecs import reference_hash
from fedpara_plugins.references.version_zero import reference_from_header
from harness.cells.flower import GAMMA, METHODS
from harness.cells.strategies import STRATEGIES
from harness.flower.apps import Hooks, Outcome, federate
from harness.flower.inprocess_grid import InProcessGrid, Sent
from harness.flower.legacy_apps import (
    ARRAY_ACCESS,
    ArrayAccess,
    LegacyExperiment,
    legacy_plain_apps,
    legacy_plugin_apps,
)
from harness.oracles.cell_model import slow_options
from harness.oracles.descriptions import decode_payload, peek_header
from harness.oracles.plain_loop import RULES, PlainResult, run_plain_loop
from harness.oracles.task import TrainingTask

State = dict[str, Tensor]

TASK = TrainingTask(clients=3, rounds=3, epochs=1)
PAIR = TrainingTask(clients=2, rounds=3, epochs=1)
"""The legacy API sums replies in whatever order its threads end; of two, either gives the same."""
OPTIMIZERS = ("fedavg", "fedprox", "fedadam")
LOSSY = ("int8", "balanced", "small")
BOTH = frozenset({"net", "app"})
NEITHER: frozenset[str] = frozenset()
NET, APP = frozenset({"net"}), frozenset({"app"})


def _section(method: str, codec: str = "none", **options: Any) -> dict[str, Any]:
    chosen = {"method": method, "codec": codec, "gamma": GAMMA, **options}
    return {f"fedpara.{key.replace('_', '-')}": value for key, value in chosen.items()}


def _run(experiment: LegacyExperiment, section: Mapping[str, Any], **options: Any) -> Outcome:
    apps = legacy_plugin_apps(experiment)
    return federate(apps, section, **options)


def _build(task: TrainingTask, method: str, private: tuple[str, ...] = ()) -> nn.Module:
    net = task.net()
    return fedpara.convert(net, method=method, gamma=GAMMA, private=private)


def _private(task: TrainingTask, method: str, private: tuple[str, ...] = ()) -> State:
    return fedpara.split(_build(task, method, private)).private


@cache
def _plain_loop(
    task: TrainingTask, strategy: str, method: str, private: tuple[str, ...] = ()
) -> PlainResult:
    spec = STRATEGIES[strategy]
    return run_plain_loop(
        task,
        partial(_build, task, method, private),
        RULES[spec.rule](**spec.rule_options),
        proximal_mu=spec.proximal_mu,
        private_names=tuple(_private(task, method, private)),
    )


def _distance(a: State, b: State, keys: Mapping[str, Any] | list[str]) -> float:
    return float(sum(((a[key].double() - b[key].double()) ** 2).sum() for key in keys) ** 0.5)


def _assert_near(state: State, plain: PlainResult, private: State) -> None:
    """Assert that a run ends near the plain loop, relative to its way."""
    shared = [key for key in plain.state if key not in private]
    moved = _distance(plain.state, plain.initial, shared)
    assert _distance(state, plain.state, shared) < 1e-4 * moved


# Against a plain loop ----------------------------------------------------------------------------


@pytest.mark.in_turn
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("strategy", OPTIMIZERS)
def test_a_run_is_that_of_a_plain_loop(strategy: str, method: str) -> None:
    outcome = _run(LegacyExperiment(TASK, strategy), _section(method, "lossless"))
    plain = _plain_loop(TASK, strategy, method)
    shared = [key for key in plain.state if key not in _private(TASK, method)]
    assert list(outcome.state) == list(plain.state)
    # FedAdam divides by the square root of small second moments.
    tolerance = 2e-3 if strategy == "fedadam" else 1e-5
    moved = _distance(plain.state, plain.initial, shared)
    assert _distance(outcome.state, plain.state, shared) < tolerance * moved
    assert len(outcome.losses) == len(plain.losses)
    if method != "pfedpara":  # whose server evaluates W1 alone
        assert outcome.losses == pytest.approx(plain.losses, rel=1e-3)


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
def test_a_lossy_codec_stays_near_the_plain_loop_and_saves_bytes(method: str, codec: str) -> None:
    outcome = _run(LegacyExperiment(TASK), _section(method, codec))
    plain = _plain_loop(TASK, "fedavg", method)
    shared = [key for key in plain.state if key not in _private(TASK, method)]
    moved = _distance(plain.state, plain.initial, shared)
    off = _distance(outcome.state, plain.state, shared)
    assert 0 < off < (0.5 if codec == "small" else 0.1) * moved
    uncoded = _run(LegacyExperiment(TASK), _section(method))
    ratio = sum(s.array_bytes for s in uncoded.sent) / sum(s.array_bytes for s in outcome.sent)
    assert ratio > 2


@pytest.mark.parametrize("method", ["none", "pfedpara"])
def test_the_server_asks_a_client_for_the_first_weights(method: str) -> None:
    """And once more where the server builds no model at all."""
    seen: list[Tensor] = []

    def loaded(model: nn.Module, client: int, server_round: int) -> None:
        if server_round == 1:
            seen.append(model.get_parameter("fc2.weight").detach().clone())

    section = _section(method, "lossless")
    outcome = _run(LegacyExperiment(TASK, initial=False, hooks=Hooks(loaded=loaded)), section)
    plain = _plain_loop(TASK, "fedavg", method)
    assert outcome.sent[1].kind == "get_parameters"
    assert len(seen) == TASK.clients
    for value in seen:
        assert torch.equal(value, plain.initial["fc2.weight"])
    _assert_near(outcome.state, plain, _private(TASK, method))
    without_model = _run(LegacyExperiment(TASK, initial=False, evaluate_fn=False), section)
    assert without_model.client_accuracies == pytest.approx(outcome.client_accuracies, abs=0.02)


@pytest.mark.parametrize("init", ["fit", "random"])
def test_the_first_weights_of_a_client_are_fitted_if_the_run_says_so(init: str) -> None:
    """And the other way round are not."""
    task = TrainingTask(clients=2, rounds=1, epochs=1)
    seen: list[Tensor] = []

    def loaded(model: nn.Module, client: int, server_round: int) -> None:
        seen.append(fedpara.to_dense(model).state_dict()["fc1.weight"].clone())

    experiment = LegacyExperiment(
        task, initial=False, evaluate_fn=False, hooks=Hooks(loaded=loaded)
    )
    _run(experiment, _section("fedpara", init=init) | {"fedpara.gamma": 1.0})
    torch.manual_seed(task.seed)
    dense = task.net().get_parameter("fc1.weight").detach()
    off = [float((value - dense).norm() / dense.norm()) for value in seen]
    assert len(off) == task.clients
    assert all(value < 0.3 if init == "fit" else value > 1 for value in off)


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", ["lossless", "int8"])
@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
def test_an_app_may_send_parameters_and_keep_its_buffers(method: str, codec: str) -> None:
    """Shorter than the state of a model with BatchNorm, whose statistics then stay at home."""
    task = TrainingTask(model="batchnorm", clients=2, rounds=2, epochs=1)
    slow = slow_options(method)
    build = partial(fedpara.convert, method=method, gamma=GAMMA, clip="none", **slow)
    names = [name for name, _ in _build(task, method).named_parameters()]
    experiment = LegacyExperiment(task, part="parameters")
    outcome = _run(experiment, _section(method, codec, **slow))
    by_hand = federate(legacy_plain_apps(experiment, lambda: build(task.net())))
    shared = [key for key in names if key not in _private(task, method)]
    if method != "pfedpara":
        off = _distance(outcome.state, by_hand.state, shared)
        assert off <= (1e-6 if codec == "lossless" else 0.05)
    for tensors in _travelled(outcome):
        if method != "none":
            assert list(tensors) == shared
        assert not any("running" in key for key in tensors)
    assert outcome.losses[-1] < outcome.losses[0]


def test_batchnorm_travels_with_the_state() -> None:
    task = TrainingTask(model="batchnorm", clients=2, rounds=2, epochs=1)
    outcome = _run(LegacyExperiment(task), _section("fedpara", "lossless"))
    plain = _plain_loop(task, "fedavg", "fedpara")
    assert list(outcome.state) == list(plain.state)
    assert {k: v.dtype for k, v in outcome.state.items()} == {
        k: v.dtype for k, v in plain.initial.items()
    }
    assert outcome.losses == pytest.approx(plain.losses, rel=1e-3)


# With everything off -----------------------------------------------------------------------------


def _assert_same_messages(mine: Outcome, theirs: Outcome) -> None:
    assert len(mine.sent) == len(theirs.sent) == 2 * 2 * PAIR.rounds * PAIR.clients

    def place(sent: Sent) -> tuple[str, int, str, int]:
        return sent.kind, sent.round, sent.direction, sent.partition

    right = {place(sent): sent for sent in theirs.sent}
    assert len(right) == len(theirs.sent)
    for sent in mine.sent:
        # Flower's id of the content is the hash of everything in it.
        assert sent.content.object_id == right[place(sent)].content.object_id, place(sent)


@pytest.mark.in_turn
@pytest.mark.parametrize("section", [_section("none"), {}], ids=["none", "no section"])
@pytest.mark.parametrize("strategy", OPTIMIZERS)
def test_with_method_and_codec_none_every_message_is_the_plain_apps(
    strategy: str, section: dict[str, Any]
) -> None:
    experiment = LegacyExperiment(PAIR, strategy)
    plain = federate(legacy_plain_apps(experiment))
    plugged = _run(experiment, section)
    _assert_same_messages(plugged, plain)
    assert plugged.losses == plain.losses
    with pytest.raises(AssertionError):  # the comparison can fail
        _assert_same_messages(_run(experiment, _section("none", "lossless")), plain)


# Private state -----------------------------------------------------------------------------------


def _travelled(outcome: Outcome) -> list[State]:
    """Decode every payload as a third party who has seen all earlier messages could."""
    held: dict[str, State] = {}
    found = []
    for sent in outcome.sent:
        for record in sent.arrays.values():
            (array,) = record.values()
            payload = array.numpy().tobytes()
            header = peek_header(payload)
            base = reference_from_header(header.extra, header.model, limit=10**7)
            known = held if base is None else {base.reference: base.tensors}
            tensors = dict(decode_payload(payload, references=known, limit=10**7).tensors)
            if sent.direction == "down":
                held[reference_hash(tensors)] = tensors
            found.append(tensors)
    return found


PRIVATE = [
    ("pfedpara", ()),
    ("none", ("fc2.*", "norm*")),
    ("fedpara", ("fc2.*",)),
    ("pfedpara", ("norm*",)),
]


@pytest.mark.in_turn
@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize(("method", "private"), PRIVATE)
def test_private_positions_never_travel_and_stay_with_their_client(
    method: str, private: tuple[str, ...], codec: str
) -> None:
    before: dict[tuple[int, int], State] = {}
    after: dict[tuple[int, int], State] = {}
    names = list(_private(TASK, method, private))

    def note(book: dict[tuple[int, int], State], model: nn.Module, client: int, n: int) -> None:
        state = model.state_dict()
        book[client, n] = {key: state[key].clone() for key in names}

    hooks = Hooks(loaded=partial(note, before), trained=partial(note, after))
    section = _section(method, codec, private=",".join(private))
    outcome = _run(LegacyExperiment(TASK, hooks=hooks), section)
    messages = _travelled(outcome)
    assert len(messages) == 3 * TASK.rounds * TASK.clients  # to train, back, to evaluate
    for tensors in messages:
        assert set(tensors) == set(outcome.state) - set(names)
    for client in range(TASK.clients):
        for n in range(2, TASK.rounds + 1):
            for key in names:
                assert torch.equal(before[client, n][key], after[client, n - 1][key])
                assert not torch.equal(before[client, n][key], after[client, n][key])
    plain = _plain_loop(TASK, "fedavg", method, private)
    if codec == "none" and not private:
        for client, state in plain.private.items():
            for key, value in state.items():
                torch.testing.assert_close(
                    after[client, TASK.rounds][key], value, rtol=1e-3, atol=1e-5
                )


def test_the_search_sees_private_positions_when_the_split_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(downlink, "shared_names", lambda spec: spec.keys)
    outcome = _run(LegacyExperiment(TASK), _section("pfedpara"), raises=False)
    names = set(_private(TASK, "pfedpara"))
    assert any(names & set(tensors) for tensors in _travelled(outcome))


# A client that fails, or comes back with nothing -------------------------------------------------


@pytest.mark.parametrize("failure", ["raises", "nan"])
def test_a_failing_client_is_left_out_of_that_round_only(failure: str) -> None:
    def trained(model: nn.Module, client: int, server_round: int) -> None:
        if (client, server_round) == (1, 2):
            if failure == "raises":
                raise RuntimeError("no space left on device")
            with torch.no_grad():
                model.get_parameter("fc2.weight")[3, 5] = float("nan")

    experiment = LegacyExperiment(TASK, hooks=Hooks(trained=trained))
    outcome = _run(experiment, _section("pfedpara"))
    plain = run_plain_loop(
        TASK,
        partial(_build, TASK, "pfedpara"),
        RULES["fedavg"](),
        private_names=tuple(_private(TASK, "pfedpara")),
        participants=[[0, 1, 2], [0, 2], [0, 1, 2]],
    )
    _assert_near(outcome.state, plain, _private(TASK, "pfedpara"))


def test_a_client_that_fails_at_the_first_message_does_not_end_the_run() -> None:
    """The legacy API asks each client in a call of its own: one error is not yet everybody's."""

    def trained(model: nn.Module, client: int, server_round: int) -> None:
        if (client, server_round) == (1, 1):
            with torch.no_grad():
                model.get_parameter("fc2.weight")[0, 0] = float("nan")

    outcome = _run(LegacyExperiment(TASK, hooks=Hooks(trained=trained)), _section("fedpara"))
    assert len(outcome.losses) == TASK.rounds + 1


def test_a_client_that_lost_its_state_is_served_again_in_the_same_round() -> None:
    lost: list[int] = []
    trained: list[tuple[int, int]] = []

    def tap(sent: Sent, grid: InProcessGrid) -> None:
        if (sent.kind, sent.direction, sent.round) == ("train", "down", 3) and not lost:
            grid.lose_state(2)
            lost.append(2)

    hooks = Hooks(trained=lambda model, client, n: trained.append((client, n)))
    outcome = _run(LegacyExperiment(TASK, hooks=hooks), _section("pfedpara", "int8"), tap=tap)
    assert lost
    assert set(trained) == {(c, n) for c in range(TASK.clients) for n in (1, 2, 3)}
    assert outcome.losses[-1] < outcome.losses[0]


# What a user meets -------------------------------------------------------------------------------

MISSING_LINES = [
    # lines of the client, of the server, method, codec, what the error says
    (NEITHER, BOTH, "fedpara", "none", "client_mod]"),
    (NEITHER, BOTH, "none", "int8", "client_mod]"),
    (NET, BOTH, "fedpara", "none", "client_mod]"),
    (BOTH, NET, "fedpara", "none", "server_app(ServerApp())"),
    (BOTH, NEITHER, "fedpara", "none", "server_app(ServerApp())"),
    (BOTH, NEITHER, "none", "int8", "server_app(ServerApp())"),
    (BOTH, APP, "fedpara", "none", "Net = fedpara.factorised(Net)"),
    (BOTH, APP, "pfedpara", "int8", "Net = fedpara.factorised(Net)"),
    (APP, BOTH, "fedpara", "none", "Net = fedpara.factorised(Net)"),
]


@pytest.mark.in_turn
@pytest.mark.parametrize(("client", "server", "method", "codec", "says"), MISSING_LINES)
@pytest.mark.parametrize("evaluate_fn", [True, False])
def test_a_missing_line_ends_the_run_in_its_first_round(
    client: frozenset[str],
    server: frozenset[str],
    method: str,
    codec: str,
    says: str,
    evaluate_fn: bool,
) -> None:
    experiment = LegacyExperiment(TASK, evaluate_fn=evaluate_fn)
    apps = legacy_plugin_apps(experiment, client=client, server=server)
    outcome = federate(apps, _section(method, codec), raises=False)
    assert outcome.error is not None
    assert says in str(outcome.error)
    assert {(sent.round, sent.kind) for sent in outcome.sent} <= {(1, "train")}


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"gamma": 0.5}, ["conv2.weight", "same fedpara options"]),
        ({"method": "lowrank"}, ["lowrank", "fedpara", "same fedpara options"]),
        ({"codec": "int8"}, ["codec differs", "int8", "none"]),
    ],
    ids=["gamma", "method", "codec"],
)
def test_different_options_on_the_two_sides_end_the_run_in_its_first_round(
    theirs: dict[str, Any], says: list[str]
) -> None:
    outcome = _run(
        LegacyExperiment(TASK),
        _section("fedpara"),
        client_config=_section(**{"method": "fedpara", **theirs}),
        raises=False,
    )
    assert isinstance(outcome.error, fedpara.FedParaError)
    for text in says:
        assert text in str(outcome.error)
    assert {(sent.round, sent.kind) for sent in outcome.sent} == {(1, "train")}


def test_a_list_of_something_else_is_refused_with_the_lengths() -> None:
    experiment = LegacyExperiment(TASK, evaluate_fn=False)
    whole = ARRAY_ACCESS["state"]
    halves = {
        "server": ArrayAccess(lambda model: whole.get(model)[:5], whole.set),
        "client": ArrayAccess(lambda model: whole.get(model)[:-1], whole.set),
    }
    for side, part in halves.items():
        ARRAY_ACCESS[side] = part
        try:
            wrong = LegacyExperiment(TASK, part=side, evaluate_fn=False)
            right = legacy_plugin_apps(experiment)
            broken = legacy_plugin_apps(wrong)
            apps = type(right)(
                client=broken.client if side == "client" else right.client,
                server=broken.server if side == "server" else right.server,
            )
            outcome = federate(apps, _section("fedpara"), raises=False)
        finally:
            del ARRAY_ACCESS[side]
        assert isinstance(outcome.error, fedpara.FedParaError)
        assert "state_dict().values()" in str(outcome.error)
        assert {sent.round for sent in outcome.sent} <= {1}
