"""Server and client managers: rounds, failures, and the end of a run, in threads of one process.

The same with real processes and transports: engine_tests/test_fedml_*.py.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("fedml", reason="FedML's environments only")

from fedml.core import Context
from fedml.core.distributed.communication.message import Message
from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS

from fedpara_plugins import ConfigError, FedParaError, MismatchError
from fedpara_plugins_fedml.checks.supported import is_distributed, lacks_optimizer
from fedpara_plugins_fedml.modes import server_manager
from fedpara_plugins_fedml.modes.placement import SiloPlacement
from fedpara_plugins_fedml.transport.blocking_queue import BlockingQueue, use_blocking_queue
from fedpara_plugins_fedml.transport.protocol import CHECK, FINISH, HEARTBEAT, ONLINE, REPLY, TASK
from fedpara_plugins_fedml.transport.shutdown import close_transport
from harness.fedml.project import model
from harness.fedml.project import run as run_single
from harness.fedml.threads import PATIENCE, Parties, QueueTransport
from harness.matrix.smoke import matrix_only

KEYS: dict[str, Any] = {
    "fedpara_method": "fedpara",
    "fedpara_gamma": 0.3,
    "fedpara_codec": "balanced",
}
KEYS |= {"fedpara_init": "seeded"}  # the threads of a run share one random generator
PERSONAL = {**KEYS, "fedpara_method": "pfedpara"}


class Kept(DefaultServerAggregator):  # type: ignore[misc]
    """Remembers the last model."""

    last: dict[str, torch.Tensor]

    def set_model_params(self, model_parameters: Any) -> None:
        super().set_model_params(model_parameters)
        Kept.last = {name: value.clone() for name, value in model_parameters.items()}


def trouble(what: dict[int, str]) -> Any:
    """Return a trainer that fails in some rounds, the first being 1."""

    class Trainer(ModelTrainerCLS):  # type: ignore[misc]
        def train(self, train_data: Any, device: Any, args: Any, **more: Any) -> None:
            kind = what.get(args.round_idx + 1)
            if kind == "raises":
                raise RuntimeError("the disk is full")
            super().train(train_data, device, args, **more)
            if kind == "nan":
                with torch.no_grad():
                    next(iter(self.model.parameters())).fill_(torch.nan)

    return Trainer


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {PATIENCE:g} s")
        time.sleep(0.01)


def kinds(parties: Parties, rank: int) -> list[int]:
    return [m.get_type() for m in parties.transports[rank].sent if m.get_type() != HEARTBEAT]


@pytest.mark.parametrize("keys", [KEYS, PERSONAL, {"fedpara_mend": True}], ids=str)
def test_a_run_gives_the_weights_of_the_single_process(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    parties = Parties(monkeypatch, keys=keys, aggregator=Kept).run()
    assert not parties.errors
    assert not parties.ended
    single = run_single(client_num_in_total=2, client_num_per_round=2, comm_round=3, **keys)
    assert Kept.last.keys() == single.state.keys()
    for name, value in single.state.items():
        torch.testing.assert_close(Kept.last[name], value)
    # Each client is sent a task a round and the last model once; nothing twice.
    assert kinds(parties, 0).count(TASK) == 2 * 3
    carried = [
        m for m in parties.transports[0].sent if m.get_type() == FINISH and m.get("model_params")
    ]
    assert len(carried) == 2


def test_the_last_model_is_on_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    trainers: dict[int, Any] = {}

    def made(rank: int) -> Any:
        def make(net: Any, args: Any) -> Any:
            trainers[rank] = ModelTrainerCLS(net, args)
            return trainers[rank]

        return make

    keys = {**PERSONAL, "fedpara_codec": "none"}
    Parties(monkeypatch, keys=keys, trainers={1: made(1), 2: made(2)}, aggregator=Kept).run()
    states = {rank: trainer.get_model_params() for rank, trainer in trainers.items()}
    assert torch.equal(states[1]["0.x1"], Kept.last["0.x1"])
    assert torch.equal(states[2]["0.x1"], Kept.last["0.x1"])
    assert not torch.equal(states[1]["0.x2"], states[2]["0.x2"])  # each its own


def test_more_silos_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silos keep their state: weights as in the single process, which has all of them."""
    numbers = {"client_num_in_total": 4, "client_num_per_round": 2, "comm_round": 5}
    parties = Parties(monkeypatch, keys={**PERSONAL, **numbers}, aggregator=Kept).run()
    assert not parties.errors
    single = run_single(**numbers, **PERSONAL)
    for name, value in single.state.items():
        torch.testing.assert_close(Kept.last[name], value)


# Bad clients


def test_a_bad_answer_costs_one_round(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parties = Parties(
        monkeypatch, keys={**KEYS, "comm_round": 5}, aggregator=Kept,
        trainers={2: trouble({1: "raises", 2: "nan"})},
    )  # fmt: skip
    count = 0

    def damaged(message: Message) -> Message:
        nonlocal count
        if message.get_type() == REPLY:
            count += 1
            if count == 3:
                message.add_params("model_params", "no bytes")
            if count == 4:
                message.add_params("model_params", message.get("model_params")[:-40])
        return message

    for rank in range(3):
        parties.start(rank)
        wait_until(lambda rank=rank: rank in parties.transports)
    parties.transports[2].altered = damaged
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        parties.wait()
    assert not parties.errors
    left_out = [r.getMessage() for r in caplog.records if "left out client 1" in r.getMessage()]
    assert [f"round {number}" in line for number, line in enumerate(left_out, 1)] == [True] * 4
    assert "the disk is full" in left_out[0]
    assert "left out client 0" not in caplog.text
    assert all(torch.isfinite(value).all() for value in Kept.last.values())


def test_a_round_without_any_answer_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = trouble({2: "raises"})
    parties = Parties(monkeypatch, keys=KEYS, trainers={1: bad, 2: bad}).run()
    assert "round 2 has 0 usable answers" in str(parties.errors[0])
    for rank in (1, 2):
        assert "the server ended the run: round 2 has 0 usable" in str(parties.errors[rank])


def test_a_task_that_cannot_be_read_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parties, spoilt = Parties(monkeypatch, keys=KEYS, aggregator=Kept), list[Message]()

    def altered(message: Message) -> Message:
        if message.get_type() != TASK or message.get_receiver_id() != 2 or len(spoilt) == 2:
            return message
        spoilt.append(message)
        return Message("not read by FedML", 0, 2)

    parties.start_server(altered)
    for rank in (1, 2):
        parties.start(rank)
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        parties.wait()
    assert not parties.errors
    assert len(spoilt) == 2
    assert "left out" not in caplog.text


# Parties that are gone


class Dies(ModelTrainerCLS):  # type: ignore[misc]
    """Is cut off in the second round, before it answers."""

    parties: Parties

    def train(self, train_data: Any, device: Any, args: Any, **more: Any) -> None:
        if args.round_idx == 1:
            self.parties.cut(args.rank)
        super().train(train_data, device, args, **more)


class Killed(Dies):
    """Does not go on either: nothing that it did in this round is kept."""

    def train(self, train_data: Any, device: Any, args: Any, **more: Any) -> None:
        super().train(train_data, device, args, **more)
        if args.round_idx == 1:
            raise SystemExit("killed")


@pytest.mark.parametrize("needed", [0, 2])
def test_a_client_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, needed: int
) -> None:
    keys = {**KEYS, "fedpara_timeout": 5, "fedpara_min_clients": needed}
    parties = Dies.parties = Parties(monkeypatch, keys=keys, trainers={2: Dies})
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        parties.run()
    assert "the server is gone" in str(parties.errors[2])
    if not needed:
        assert set(parties.errors) == {2}
        for number in (2, 3):
            assert f"left out client 1 in round {number}: client 2 is gone" in caplog.text
        assert "the run has ended without client 2: it is gone" in caplog.text
        return
    for rank in (0, 1):
        assert "client 2 is gone" in str(parties.errors[rank])
        assert "1 of 2 client processes are left, and 2 needed" in str(parties.errors[rank])


class Slow(ModelTrainerCLS):  # type: ignore[misc]
    """Is busy in the second round until the third one is over."""

    rounds = 0

    def train(self, train_data: Any, device: Any, args: Any, **more: Any) -> None:
        super().train(train_data, device, args, **more)
        if args.round_idx == 1:
            wait_until(lambda: Slow.rounds >= 3)


class Counting(Kept):
    """Counts the rounds, and waits in the fourth for what comes late."""

    def set_model_params(self, model_parameters: Any) -> None:
        super().set_model_params(model_parameters)
        Slow.rounds = self.args.round_idx + 1
        if Slow.rounds == 4:
            time.sleep(2)


def test_a_client_that_does_not_answer_in_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It sends signs of life, and costs the others the time of one round."""
    Slow.rounds = 0
    keys = {**PERSONAL, "fedpara_timeout": 30, "fedpara_round_timeout": 3, "comm_round": 6}
    parties = Parties(monkeypatch, keys=keys, trainers={2: Slow}, aggregator=Counting)

    def spoilt(message: Message) -> Message:
        if message.get_type() == FINISH and message.get("model_params"):
            message.add_params("model_params", b"FPE1")
        return message

    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        parties.start_server(spoilt)
        for rank in (1, 2):
            parties.start(rank)
        parties.wait()
    assert not parties.errors
    for rank in (1, 2):  # its late answer is no reason to be silent about its last one
        assert f"client {rank} cannot use the last model" in caplog.text
    lines = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "round 2: client 2 has not answered within 3 s" in lines[0]
    assert "round 3: client 2 still works on an earlier round" in lines[1]
    assert all("left out client 1 in" in line for line in lines)
    assert not any("round 5" in line or "round 6" in line for line in lines)


def test_a_server_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Aggregator(DefaultServerAggregator):  # type: ignore[misc]
        def aggregate(self, models: Any) -> Any:
            parties.cut(0)
            return super().aggregate(models)

    keys = {**KEYS, "fedpara_timeout": 5}
    parties = Parties(monkeypatch, keys=keys, aggregator=Aggregator)
    parties.run()
    for rank in (1, 2):
        assert "the server is gone: " in str(parties.errors[rank])


def test_a_client_that_trains_on_after_the_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedpara_plugins_fedml.transport import peers

    monkeypatch.setattr(peers, "EXIT_DELAY", 0.2)

    class Long(ModelTrainerCLS):  # type: ignore[misc]
        def train(self, train_data: Any, device: Any, args: Any, **more: Any) -> None:
            parties.cut(0)
            wait_until(lambda: bool(parties.ended))

    keys = {**KEYS, "fedpara_timeout": 1}
    parties = Parties(monkeypatch, 1, keys=keys, trainers={1: Long})
    parties.run()
    assert "this client still trained: the server is gone" in parties.ended[0]


def killed_and_started_again(parties: Parties) -> None:
    """Run to the end; when client 2 has died, another process takes its place."""
    for rank in (0, 1, 2):
        parties.start(rank)
    wait_until(lambda: 2 in parties.errors)
    parties._trainers = {}
    parties.start(2)
    parties.wait()


def test_a_client_that_comes_back_is_asked_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    keys = {**PERSONAL, "fedpara_timeout": 30, "fedpara_state_dir": str(tmp_path / "state")}
    parties = Dies.parties = Parties(monkeypatch, keys=keys, trainers={2: Killed}, aggregator=Kept)
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        killed_and_started_again(parties)
    assert "client 2 is back" in caplog.text
    assert "left out" not in caplog.text
    monkeypatch.undo()
    own = {**keys, "fedpara_state_dir": str(tmp_path / "other")}
    single = run_single(client_num_in_total=2, client_num_per_round=2, comm_round=3, **own)
    for name, value in single.state.items():
        torch.testing.assert_close(Kept.last[name], value)


def test_a_client_that_comes_back_without_anything_takes_part_in_that_round(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It lacks the reference, and frozen tensors that its own model does not hold either."""

    def frozen(seed: int) -> Callable[[], Any]:
        def build() -> Any:
            net = model(seed)
            net[0].requires_grad_(False)
            return net

        return build

    keys = {**KEYS, "fedpara_timeout": 30, "fedpara_init": "random", "fedpara_min_size": 0}
    models = {0: frozen(3), 1: frozen(3), 2: frozen(4)}
    parties = Dies.parties = Parties(monkeypatch, keys=keys, trainers={2: Killed}, models=models)
    with caplog.at_level(logging.INFO, "fedpara"):
        killed_and_started_again(parties)
    assert caplog.text.count("client 1 lacks the frozen tensors") == 2
    assert "left out" not in caplog.text


class ComesBack(ModelTrainerCLS):  # type: ignore[misc]
    """Comes back again and again in the second round, and trains as long as it is listened to."""

    parties: Parties

    def train(self, train_data: Any, device: Any, args: Any, **more: Any) -> None:
        if args.round_idx == 1:
            for number in range(20):
                message = Message(ONLINE, args.rank, 0)
                fields = {"client_status": "ONLINE", "fedpara": "hello", "session": f"n{number}"}
                for name, value in fields.items():
                    message.add_params(name, value)
                self.parties.transports[args.rank].send_message(message)
        super().train(train_data, device, args, **more)


def test_a_client_that_comes_back_again_and_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parties = ComesBack.parties = Parties(monkeypatch, keys=KEYS, trainers={2: ComesBack})
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        parties.run()
    assert not parties.errors
    lines = [r.getMessage() for r in caplog.records if "left out" in r.getMessage()]
    assert "left out client 1 in round 2: it has come back 6 times in this round" in lines[0]
    assert not any("left out client 0" in line for line in lines)
    sent = [m for m in parties.transports[0].sent if m.get_type() == TASK]
    assert len([m for m in sent if m.get_receiver_id() == 2]) <= 3 * (
        1 + server_manager.MOST_RESENT
    )


# Two sides that do not fit

OTHER_KEY = "the same on the way of another key; errors of keys are in test_fedml_errors.py"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        matrix_only({"client_num_per_round": 9}, "client_num_per_round is 9", reason=OTHER_KEY),
        matrix_only({"test_on_clients": "always"}, "test_on_clients", reason=OTHER_KEY),
        ({"federated_optimizer": "FedAvgg"}, "did you mean FedAvg"),
    ],
)
def test_a_client_that_is_set_up_differently(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changed: dict[str, Any],
    reason: str,
) -> None:
    """It is left out from the start; if all are, the run ends with that reason."""
    keys = {**KEYS, "fedpara_timeout": 5}
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        parties = Parties(monkeypatch, keys=keys, of_rank={2: changed}).run()
    assert set(parties.errors) == {2}
    assert reason in str(parties.errors[2])
    named = [r.getMessage() for r in caplog.records if "client 2 cannot take" in r.getMessage()]
    assert reason in named[0]
    assert "1 of 2 client processes are left" in named[0]
    for number in (1, 2, 3):
        assert f"left out client 1 in round {number}: client 2 cannot take part" in caplog.text
    parties = Parties(monkeypatch, keys=keys, of_rank={1: changed, 2: changed}).run()
    assert set(parties.errors) == {0, 1, 2}
    for error in parties.errors.values():
        assert isinstance(error, ConfigError)
        assert reason in str(error)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"fedpara_gamma": 0.6}, "gamma"),
        matrix_only({"fedpara_codec": "int8"}, "fedpara_codec", reason=OTHER_KEY),
    ],
)
def test_clients_whose_model_or_codec_differs(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changed: dict[str, Any],
    reason: str,
) -> None:
    """One is left out of each round; if all are, the run ends with that reason."""
    keys = {**KEYS, "fedpara_timeout": 5}
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        assert not Parties(monkeypatch, keys=keys, of_rank={2: changed}).run().errors
    lines = [r.getMessage() for r in caplog.records if "left out client" in r.getMessage()]
    assert len(lines) == 3
    assert all("left out client 1 in round" in line and reason in line for line in lines)
    parties = Parties(monkeypatch, keys=keys, of_rank={1: changed, 2: changed}).run()
    assert set(parties.errors) == {0, 1, 2}
    for error in parties.errors.values():
        assert isinstance(error, FedParaError)
        assert reason in str(error)


class Assessing(Kept):
    """Assesses contributions in its own way, from what FedML's Context holds."""

    seen: list[tuple[list[int], dict[str, torch.Tensor]]]

    def assess_contribution(self) -> None:
        context = Context()
        models = context.get(Context.KEY_CLIENT_MODEL_LIST)
        mean = {
            key: sum(e * s[key] for e, s in models) / sum(e for e, _ in models)
            for key in models[0][1]
        }
        Assessing.seen.append((context.get(Context.KEY_CLIENT_ID_LIST_IN_THIS_ROUND), mean))
        assert len(context.get(Context.KEY_METRICS_ON_AGGREGATED_MODEL)) == 4
        assert len(context.get(Context.KEY_METRICS_ON_LAST_ROUND)) == 4


def test_an_assessment_of_contributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own is called each round, with the clients' models; FedML's own are refused."""
    Assessing.seen = []
    keys = {**KEYS, "enable_contribution": True, "contribution_alg": "LOO"}
    assert not Parties(monkeypatch, keys=keys, aggregator=Assessing).run().errors
    assert [silos for silos, _ in Assessing.seen] == [[0, 1]] * 3
    for name, value in Assessing.seen[-1][1].items():
        torch.testing.assert_close(value, Kept.last[name])
    parties = Parties(monkeypatch, keys={**keys, "fedpara_timeout": 5}, aggregator=Kept).run()
    for error in parties.errors.values():
        assert "contribution_alg LOO" in str(error)
    assert set(parties.errors) == {0, 1, 2}


def test_a_server_that_is_set_up_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    parties = Parties(
        monkeypatch, keys={**KEYS, "fedpara_timeout": 5}, of_rank={0: {"worker_num": 3}}
    ).run()
    assert isinstance(parties.errors[0], ConfigError)
    for error in parties.errors.values():
        assert "worker_num is 3" in str(error)


@pytest.mark.parametrize("clients", [1, 2])
def test_a_client_without_the_plugin(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clients: int
) -> None:
    """The last one is left out; if there is no other, the run ends with that reason."""
    parties = Parties(monkeypatch, clients, keys=KEYS)

    def stock(message: Message) -> Message:
        """Build the message by which FedML's client says that it is online."""
        if message.get_type() == ONLINE:
            message.get_params().pop("fedpara")
        return message

    parties.start(clients)
    wait_until(lambda: clients in parties.transports)
    parties.transports[clients].altered = stock
    for rank in range(clients):
        parties.start(rank)
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        parties.wait(*range(clients))
    words = f"client {clients} runs without the plugin"
    assert words in caplog.text
    if clients == 1:
        assert isinstance(parties.errors[0], ConfigError)
        assert words in str(parties.errors[0])
    else:
        assert 0 not in parties.errors
        assert 1 not in parties.errors


def test_a_client_without_the_plugin_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first word came before the server and was lost; FedML's client answers when asked."""
    monkeypatch.setattr(server_manager, "CHECK_INTERVAL", 1.0)
    parties = Parties(monkeypatch, keys=KEYS)
    client, heard = QueueTransport(2, parties.transports), list[Message]()

    class Stock:
        """What FedML's client does until then."""

        def receive_message(self, kind: Any, message: Message) -> None:
            heard.append(message)
            if kind == CHECK:
                client.send_message(Message(ONLINE, 2, 0))

    client.add_observer(Stock())
    threading.Thread(target=client.handle_receive_message, daemon=True).start()
    for rank in (0, 1):
        parties.start(rank)
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        parties.wait(0, 1)
    client.stop_receive_message()
    assert not parties.errors
    assert "client 2 runs without the plugin" in caplog.text
    assert any("client 2 runs without the plugin" in str(each.get_type()) for each in heard)


def test_a_server_without_the_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the client's first words and ends on them."""
    parties = Parties(monkeypatch, keys={**KEYS, "fedpara_timeout": 1})
    deaf = QueueTransport(0, parties.transports)
    parties.start(1)
    parties.wait()
    assert not deaf.sent
    assert isinstance(parties.errors[1], MismatchError)
    assert "it runs without the plugin" in str(parties.errors[1])


def test_a_server_without_the_plugin_gets_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """FedML's counts the client as its own, sends the first model, and ends on what it gets."""
    parties = Parties(monkeypatch, keys=KEYS)
    server, heard = QueueTransport(0, parties.transports), list[Message]()

    class Stock:
        """What FedML's server does until then."""

        def receive_message(self, kind: Any, message: Message) -> None:
            heard.append(message)
            if kind == ONLINE:
                server.send_message(Message(1, 0, message.get_sender_id()))

    server.add_observer(Stock())
    threading.Thread(target=server.handle_receive_message, daemon=True).start()
    parties.start(1)
    parties.wait()
    server.stop_receive_message()
    assert isinstance(parties.errors[1], MismatchError)
    assert "it sent FedML's own message 1" in str(parties.errors[1])
    assert heard[1].get("client_status") == "ONLINE"
    assert "the server runs without the plugin" in str(heard[-1].get_type())


def test_a_server_that_never_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    parties = Parties(monkeypatch, keys={**KEYS, "fedpara_start_timeout": 1})
    parties.start(1)
    parties.wait()
    assert "the server has not answered" in str(parties.errors[1])
    keys = {**KEYS, "fedpara_start_timeout": 1, "fedpara_timeout": 5}
    parties = Parties(monkeypatch, keys=keys)
    parties.start(0)
    parties.wait()
    assert "client 1 has not come within 1 s" in str(parties.errors[0])
    assert "0 of 2 client processes are left" in str(parties.errors[0])


def test_a_client_that_never_comes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    parties = Parties(monkeypatch, keys={**KEYS, "fedpara_start_timeout": 5})
    with caplog.at_level(logging.WARNING, "fedpara.fedml"):
        for rank in (0, 1):
            parties.start(rank)
        parties.wait()
    assert not parties.errors
    assert "client 2 has not come within 5 s (fedpara_start_timeout)" in caplog.text


# Parts


def test_what_is_distributed() -> None:
    def args(**keys: Any) -> Any:
        return SimpleNamespace(**{"training_type": "simulation", "backend": "sp", **keys})

    assert not is_distributed(args())
    assert is_distributed(args(training_type="cross_silo", backend="TRPC"))
    for keys, words in (
        ({"training_type": "cross_cloud"}, "simulation and cross_silo"),
        ({"backend": "NCCL"}, "the plugin runs sp, MPI"),
        ({"training_type": "cross_silo", "backend": "sp"}, "TRPC, MPI, GRPC, MQTT_S3"),
        (
            {"training_type": "cross_silo", "backend": "TRPC", "scenario": "hierarchical"},
            "scenario 'hierarchical'",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            is_distributed(args(**keys))
    scaffold = {"federated_optimizer": "SCAFFOLD"}
    assert lacks_optimizer(args(training_type="cross_silo", backend="TRPC", **scaffold))
    assert lacks_optimizer(args(backend="MPI", **scaffold))
    assert not lacks_optimizer(args(**scaffold))
    assert not lacks_optimizer(args(backend="MPI", federated_optimizer="FedAvg"))


def test_silos_stay_where_they_were() -> None:
    silos = SiloPlacement(10, 4, keep=True)
    homes: dict[int, int] = {}
    for number in range(20):
        drawn = silos.sample(number)
        found = silos.assign(drawn, [1, 2, 3, 4])
        assert list(found) == drawn
        for silo, home in found.items():
            assert homes.setdefault(silo, home) == home
    assert set(homes.values()) == {1, 2, 3, 4}
    assert sorted(s for p in (1, 2, 3, 4) for s in silos.assigned_to(p)) == sorted(homes)
    assert SiloPlacement(3, 3, keep=False).assign([0, 1, 2], [5, 6, 7]) == {0: 5, 1: 6, 2: 7}


@pytest.mark.parametrize("keep", [True, False])
def test_silos_of_a_process_that_takes_no_part(keep: bool) -> None:
    """Others train them where they have the data, and nobody does where they belong to it."""
    own = SiloPlacement(3, 3, keep=keep)
    assert own.assign([0, 1, 2], [5, 6, 7], [5, 6, 7]) == {0: 5, 1: 6, 2: 7}
    assert own.assign([0, 1, 2], [5, 6, 7], [5, 7]) == {0: 5, 1: 6, 2: 7}
    moving = SiloPlacement(3, 3, keep=keep, movable=True)
    assert sorted(moving.assign([0, 1, 2], [5, 6, 7], [5, 7]).values()) == [5, 5, 7]
    assert moving.assign([0, 1, 2], [5, 6, 7], [7]) == {0: 7, 1: 7, 2: 7}


def test_a_blocking_queue_takes_over_what_waits() -> None:
    old: queue.Queue[int] = queue.Queue()
    old.put(1)
    thread = SimpleNamespace(q=old)
    mpi = SimpleNamespace(
        q_receiver=old, _server_receive_thread=thread, _client_receive_thread=None
    )
    use_blocking_queue(mpi, lambda entry: entry != "no message")
    assert isinstance(mpi.q_receiver, BlockingQueue)
    assert thread.q is mpi.q_receiver
    assert (mpi.q_receiver.qsize(), mpi.q_receiver.get(), mpi.q_receiver.qsize()) == (1, 1, 0)
    grpc = SimpleNamespace(grpc_servicer=SimpleNamespace(message_q=queue.Queue()))
    mpi.q_receiver.put("no message")
    assert mpi.q_receiver.qsize() == 0
    use_blocking_queue(grpc, bool)
    assert isinstance(grpc.grpc_servicer.message_q, BlockingQueue)


def test_transports_that_cannot_end() -> None:
    """Without the others TRPC and MPI would wait: then only the end of the process will do."""
    calls: list[str] = []
    trpc = SimpleNamespace(is_running=True, stop_receive_message=lambda: calls.append("shutdown"))
    assert not close_transport(trpc, "TRPC", orderly=False)
    assert (trpc.is_running, calls) == (False, [])
    assert close_transport(trpc, "TRPC", orderly=True)
    assert calls == ["shutdown"]
    thread = SimpleNamespace(
        stop=lambda: calls.append("stop"), join=lambda seconds: calls.append("join")
    )
    mpi = SimpleNamespace(
        _stop_running=False, _server_receive_thread=thread, _client_receive_thread=None
    )
    assert not close_transport(mpi, "MPI", orderly=False)
    assert mpi._stop_running
    assert calls[1:] == ["stop", "join"]
