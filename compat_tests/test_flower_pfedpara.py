"""pFedPara on Flower: private factors never leave the client, and stay with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message
from torch import Tensor, nn

import fedpara_plugins as fedpara
from fedpara_plugins import FedParaError
from fedpara_plugins.codecs import reference_hash
from fedpara_plugins.exchange import OwnModels
from fedpara_plugins.references.version_zero import reference_from_header
from harness.cells.flower import CODECS, GAMMA
from harness.flower.apps import Experiment, Hooks, Outcome, federate, plain_apps, plugin_apps
from harness.flower.inprocess_grid import InProcessGrid, Sent
from harness.oracles.descriptions import decode_payload, peek_header
from harness.oracles.task import TrainingTask
from harness.processes.canaries import Canaries

State = dict[str, Tensor]

TASK = TrainingTask(rounds=3, epochs=1)
MOST = 1000
"""Places of each tensor that are searched for."""


def _section(codec: str = "none", method: str = "pfedpara") -> dict[str, Any]:
    return {"fedpara.method": method, "fedpara.gamma": GAMMA, "fedpara.codec": codec}


def _federate(hooks: Hooks, codec: str = "none", *, sound: bool = True, **options: Any) -> Outcome:
    apps = plugin_apps(Experiment(TASK, "fedavg", options, hooks))
    return federate(apps, _section(codec), search=sound, raises=sound)


def _copy(state: State) -> State:
    return {key: value.detach().clone() for key, value in state.items()}


# Searching the wire ------------------------------------------------------------------------------


class Diary:
    """Hooks that write sentinels into private factors, and note what each client held."""

    def __init__(self) -> None:
        self.private: list[State] = []
        self.shared: dict[tuple[int, int], State] = {}

    def trained(self, model: nn.Module, client: int, server_round: int) -> None:
        """Fill in sentinels, small enough to train on, each with bits of its own."""
        parts = fedpara.split(model)
        self.private.append(_copy(parts.private))  # as trained
        for place, value in enumerate(parts.private.values()):
            count = torch.arange(value.numel(), dtype=torch.float32).reshape(value.shape)
            first = 1e-3 * (1 + 0.1 * place + 0.01 * client + 0.001 * server_round)
            value.copy_(first + 1e-7 * count)
        self.private.append(_copy(parts.private))
        self.shared[client, server_round] = _copy(parts.shared)

    def loaded(self, model: nn.Module, client: int, server_round: int) -> None:
        """Note the private state that was loaded: it is private wherever it comes from."""
        self.private.append(_copy(fedpara.split(model).private))

    @property
    def hooks(self) -> Hooks:
        """Return the hooks of an experiment."""
        return Hooks(loaded=self.loaded, trained=self.trained)


def _private(diary: Diary) -> Canaries:
    """Return the private factors of all clients at any time, to search for.

    The seeded first values are no secret: every client and the server compute them alike.
    """
    values = [value for state in diary.private for value in state.values()]
    seeded = fedpara.split(_converted()).private.values()
    canaries = Canaries(values, known=seeded, most=MOST)
    assert len(canaries) > 10_000
    return canaries


def _converted() -> nn.Module:
    return fedpara.convert(TASK.net(), method="pfedpara", gamma=GAMMA)


def test_no_byte_of_a_private_factor_is_on_the_wire() -> None:
    diary = Diary()
    outcome = _federate(diary.hooks)
    assert len(diary.shared) == TASK.rounds * TASK.clients
    private = _private(diary)
    assert not any(private.found_in(sent.data) for sent in outcome.sent)
    # The positive control: the same search finds every shared factor, in the message it is in.
    for sent in outcome.sent:
        if (sent.direction, sent.kind) == ("up", "train"):
            for key, value in diary.shared[sent.partition, sent.round].items():
                control = Canaries([value], most=MOST)
                assert control.missing_from(sent.data) == 0, key
                # Palindromic mantissas (of a pair, 1 in 65,536) are there in the other byte order
                # too, one byte earlier, if the value before has the same upper byte.
                assert control.found_in(sent.data) >= len(control), key


def test_the_search_finds_private_factors_when_the_split_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(OwnModels, "hidden_names", lambda *given: set())
    diary = Diary()
    outcome = _federate(diary.hooks, sound=False)
    assert "private names stay on the client" in str(outcome.error)  # the server takes none
    replies = [sent for sent in outcome.sent if (sent.direction, sent.kind) == ("up", "train")]
    private = _private(diary)
    assert all(private.found_in(sent.data) > 1000 for sent in replies)


def test_the_search_finds_private_factors_when_the_plugin_is_away() -> None:
    """A converted model in an app without the plugin sends all it has."""
    diary = Diary()
    apps = plain_apps(Experiment(TASK, "fedavg", {}, diary.hooks), _converted)
    sent = federate(apps).sent
    private = _private(diary)
    assert sum(private.found_in(message.data) for message in sent) > 10_000


@pytest.mark.parametrize("name", ["copy", "fedpara.copy", "fedpara.variate"])
def test_a_further_record_of_the_app_holds_nothing_private_either(name: str) -> None:
    """Whatever it is called: an app may send its state twice, and name it like the plugin does."""

    def adding(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if "arrays" in reply.content:
            reply.content[name] = reply.content["arrays"]
            added.append(name)
        return reply

    diary, added, wire = Diary(), [], []
    experiment = Experiment(TASK, "fedavg", {}, diary.hooks, mods=[adding])
    # FedAvg takes one record only; Flower 1.22 says so by an error that is no Exception.
    with contextlib.suppress(BaseException):
        federate(
            plugin_apps(experiment),
            _section(),
            tap=lambda sent, grid: wire.append(sent),
            raises=False,
        )
    assert added
    private = _private(diary)
    assert not any(private.found_in(sent.data) for sent in wire)
    if name == "fedpara.variate":  # there is no telling what it is: the whole reply is refused
        assert not [sent for sent in wire if sent.direction == "up" and sent.arrays]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module."])
def test_the_state_of_a_wrapped_model_does_not_leave_the_client(prefix: str) -> None:
    """As of `torch.compile` or `DataParallel`: under such names private factors would be sent."""

    def wrapped(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if "arrays" in reply.content:
            found = reply.content.array_records["arrays"]
            reply.content["arrays"] = ArrayRecord({prefix + n: a for n, a in found.items()})
        return reply

    diary, wire = Diary(), []
    experiment = Experiment(TASK, "fedavg", {}, diary.hooks, mods=[wrapped])
    with pytest.raises(FedParaError, match=f"model.{prefix}state_dict"):
        federate(plugin_apps(experiment), _section(), tap=lambda sent, grid: wire.append(sent))
    assert diary.private
    private = _private(diary)
    assert not any(private.found_in(sent.data) for sent in wire)


# What coded messages hold ------------------------------------------------------------------------


def _decoded(outcome: Outcome) -> Iterator[tuple[Sent, State]]:
    """Decode every payload as a third party who has seen all earlier messages could."""
    held: dict[str, State] = {}
    for sent in outcome.sent:
        for record in sent.arrays.values():
            (array,) = record.values()
            payload = array.numpy().tobytes()
            header = peek_header(payload)
            base = reference_from_header(header.extra, header.model, limit=10**7)
            known = held if base is None else {base.reference: base.tensors}
            tensors = decode_payload(payload, references=known, limit=10**7).tensors
            if sent.direction == "down":
                held[reference_hash(tensors)] = tensors
            yield sent, tensors


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", CODECS)
def test_what_can_be_decoded_is_the_shared_part(codec: str) -> None:
    shared = list(fedpara.split(_converted()).shared)
    messages = 0
    in_steps = 0
    outcome = _federate(Hooks(), codec)
    for sent, tensors in _decoded(outcome):
        assert list(tensors) == shared, (sent.direction, sent.round, sent.kind)
        messages += 1
    for sent in outcome.sent:
        for record in sent.arrays.values():
            in_steps += "int8" in peek_header(next(iter(record.values())).numpy().tobytes()).codec
    assert messages == 3 * TASK.rounds * TASK.clients  # to train, back, to evaluate
    assert in_steps == (messages - TASK.clients if codec == "int8" else 0)  # all but first contact


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", CODECS)
def test_changing_private_values_changes_no_byte_of_any_message(codec: str) -> None:
    """The shared part trains alike in both runs, the private part as different as can be."""

    def train(salt: int) -> Hooks:
        def step(model: nn.Module, client: int, server_round: int) -> None:
            parts = fedpara.split(model)
            for seed, part in ((0, parts.shared), (salt, parts.private)):
                rng = torch.Generator().manual_seed(1000 * seed + 10 * client + server_round)
                for value in part.values():
                    value.add_(0.01 * torch.randn(value.shape, generator=rng))

        return Hooks(train=step)

    # Clients' accuracies do depend on private factors, and are the app's to send.
    first, second = (_federate(train(salt), codec, fraction_evaluate=0.0) for salt in (1, 2))
    for partition in range(TASK.clients):
        mine, other = (run.grid.client_state(partition) for run in (first, second))
        assert mine.object_id != other.object_id
    assert len(first.sent) == len(second.sent) == 2 * TASK.rounds * TASK.clients
    for one, two in zip(first.sent, second.sent, strict=True):
        assert (one.partition, one.round, one.direction) == (
            two.partition,
            two.round,
            two.direction,
        )
        assert list(one.wire.children) == list(
            two.wire.children
        )  # ids: hashes of the whole content
        assert one.content.object_id == two.content.object_id


# Where private factors are kept ------------------------------------------------------------------


def _watched() -> tuple[Hooks, dict[tuple[int, int], State], dict[tuple[int, int], State]]:
    before: dict[tuple[int, int], State] = {}
    after: dict[tuple[int, int], State] = {}

    def loaded(model: nn.Module, client: int, server_round: int) -> None:
        before[client, server_round] = _copy(fedpara.split(model).private)

    def trained(model: nn.Module, client: int, server_round: int) -> None:
        after[client, server_round] = _copy(fedpara.split(model).private)

    return Hooks(loaded=loaded, trained=trained), before, after


def _assert_equal(mine: State, theirs: State) -> None:
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        assert torch.equal(value, theirs[key]), key


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", CODECS)
def test_private_factors_persist_while_a_client_is_away(codec: str) -> None:
    """Half of the clients a round: whoever comes back goes on where it was."""
    hooks, before, after = _watched()
    task = TrainingTask(rounds=6, epochs=1)
    options = {"fraction_train": 0.5, "fraction_evaluate": 0.5}
    apps = plugin_apps(Experiment(task, "fedavg", options, hooks))
    federate(apps, _section(codec))
    returned = absent = 0
    for client, server_round in before:
        earlier = [r for c, r in after if c == client and r < server_round]
        if earlier:
            _assert_equal(before[client, server_round], after[client, max(earlier)])
            changed = after[client, server_round]
            assert not any(
                torch.equal(changed[k], v) for k, v in before[client, server_round].items()
            )
            returned += 1
            absent += max(earlier) < server_round - 1
    assert returned >= 6
    assert absent >= 2


def test_private_factors_lie_in_the_clients_state_and_nowhere_else() -> None:
    hooks, _, after = _watched()
    outcome = _federate(hooks)
    for partition in range(TASK.clients):
        own = after[partition, TASK.rounds].values()
        kept = b"".join(
            bytes(array.data)
            for record in outcome.grid.client_state(partition).array_records.values()
            for array in record.values()
        )
        mine = Canaries(own, most=MOST)
        assert mine.found_in(kept) == len(mine)
        others = [p for p in range(TASK.clients) if p != partition]
        for other in others:
            trained = Canaries(after[other, TASK.rounds].values(), known=own, most=MOST)
            assert trained.found_in(kept) == 0


def test_a_client_without_state_starts_from_the_seeded_private_factors() -> None:
    starts = []
    for seed in (7, 8):  # of the weights and the data, not of the private factors
        hooks, before, _ = _watched()
        task = TrainingTask(rounds=1, epochs=1, seed=seed)
        federate(plugin_apps(Experiment(task, "fedavg", {}, hooks)), _section())
        starts += [before[client, 1] for client in range(task.clients)]
    torch.manual_seed(12345)
    starts.append(_copy(fedpara.split(_converted()).private))
    for start in starts[1:]:
        _assert_equal(start, starts[0])
    assert any(bool(value.any()) for value in starts[0].values())
    elsewhere = fedpara.convert(TASK.net(), method="pfedpara", gamma=GAMMA, seed=1)
    other = fedpara.split(elsewhere).private
    assert not all(torch.equal(other[key], value) for key, value in starts[0].items())


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", CODECS)
def test_a_client_that_lost_its_state_starts_anew_and_the_run_goes_on(codec: str) -> None:
    hooks, before, after = _watched()
    lost: list[int] = []

    def tap(sent: Sent, grid: InProcessGrid) -> None:
        if (sent.kind, sent.direction, sent.round) == ("train", "down", 3) and not lost:
            grid.lose_state(2)  # restarted between the second round and the third
            lost.append(2)

    apps = plugin_apps(Experiment(TASK, "fedavg", {}, hooks))
    outcome = federate(apps, _section(codec), tap=tap)
    assert lost
    _assert_equal(before[2, 3], before[2, 1])
    for client in (0, 1, 3):
        _assert_equal(before[client, 3], after[client, 2])
    # It took part in the round all the same.
    assert set(after) == {(c, r) for c in range(TASK.clients) for r in (1, 2, 3)}
    assert len(outcome.losses) == TASK.rounds + 1
    assert outcome.losses[-1] < outcome.losses[0]
    assert [line for line in outcome.log if "seeded private factors" in line]
