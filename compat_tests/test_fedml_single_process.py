"""FedML's single process with a method or codec: private state, bad clients, bytes, checkpoints."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from safetensors.torch import load_file
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError, Ledger, ModelSpec, convert
from fedpara_plugins.codecs import encode_payload, parse_codec
from fedpara_plugins.ledger import Evaluation, read_lines
from fedpara_plugins_fedml.messages.envelope import pack, unpack
from harness.fedml.project import Outcome, Sent, dataset, forget_security, model, run
from harness.oracles.descriptions import decode_payload
from harness.oracles.fedml_fedavg import FedAvgLoop

PERSONAL = {"fedpara_method": "pfedpara", "fedpara_gamma": 0.5}


@pytest.fixture(autouse=True)
def _security_forgotten() -> Iterator[None]:
    yield
    forget_security()


def accuracies(caplog: pytest.LogCaptureFixture, name: str = "test_acc") -> list[float]:
    found = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    return [float(each[name]) for each in found if name in each]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


# Private state


def test_each_client_is_tested_with_its_own_private_factors(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The accuracy that FedML logs is that of a loop in which each client keeps its own part."""
    caplog.set_level(logging.INFO)
    net = convert(model(), method="pfedpara", gamma=0.5)
    loop = FedAvgLoop(net, dataset()[5], private=ModelSpec.of(net).initial_private(), lr=0.3)
    run(**PERSONAL, comm_round=4, learning_rate=0.3, client_num_per_round=4)
    loop.run(4, 4)
    test = dataset()[6]
    each = [loop.accuracy(client, test[client]) for client in range(4)]
    assert accuracies(caplog)[-1] == pytest.approx(sum(each) / 4, abs=1e-9)
    # The control: the figure tells whose private parts were in use.
    loop.own = {client: loop.own[(client + 1) % 4] for client in range(4)}
    swapped = [loop.accuracy(client, test[client]) for client in range(4)]
    assert abs(sum(swapped) - sum(each)) > 0.04


def test_no_private_factor_is_in_any_message() -> None:
    outcome = run(**PERSONAL)
    everything = b"".join(sent.data for sent in outcome.sent)
    spec = outcome.runner.runner.server.spec
    asked = {int(sent.client) for sent in outcome.sent}
    for client in asked:
        kept = outcome.kept(client)
        for name in spec.private_keys:
            assert kept[name].any()
            assert kept[name].numpy().tobytes() not in everything
            assert kept[name].flatten()[:8].numpy().tobytes() not in everything
    # The control: what is shared is found in the same way.
    last = {sent.client: sent.data for sent in outcome.sent if sent.direction == "up"}
    client, data = next(iter(last.items()))
    shared = decode_payload(unpack(data).payloads["model"], limit=10**7).tensors
    assert set(shared) == set(spec.shared_keys)
    assert all(value.numpy().tobytes() in everything for value in shared.values())


def test_nothing_of_the_engine_is_pickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither messages nor what is kept on disk."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("pickle was called")

    keys = {**PERSONAL, "fedpara_codec": "balanced", "federated_optimizer": "SCAFFOLD"}
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    run(**keys, fedpara_state_dir=str(tmp_path), fedpara_checkpoint=str(tmp_path / "dense"))
    run(**keys, fedpara_state_dir=str(tmp_path), comm_round=4)
    with pytest.raises(AssertionError):
        pickle.dumps({})


def test_private_names_stay_on_the_device() -> None:
    """FedPer, on a dense model."""
    net = model()
    names = [name for name in net.state_dict() if name.startswith("4.")]
    first = ModelSpec.of(convert(model(), method="none", private=("4.*",))).initial_private()
    loop = FedAvgLoop(net, dataset()[5], private=first)
    wanted = loop.run(3, 2)
    outcome = run(fedpara_private="4.*")
    for name, value in wanted.items():
        torch.testing.assert_close(outcome.state[name], value, rtol=1e-5, atol=1e-6)
    for client in (0, 1, 2, 3):
        for name in names:
            torch.testing.assert_close(
                outcome.kept(client)[name], loop.own[client][name], rtol=1e-5, atol=1e-6
            )


# Codecs


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", ["balanced", "small", "tiny", "lossless", "int8", "delta+zlib"])
@pytest.mark.parametrize("method", ["none", "pfedpara"])
def test_a_codec_learns_as_plain_numbers_do(
    codec: str, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keys: dict[str, Any] = {
        "fedpara_method": method,
        "fedpara_gamma": 0.5,
        "fedpara_init": "seeded" if method != "none" else "",
        "comm_round": 12,
        "learning_rate": 0.3,
        "client_num_per_round": 4,
        "frequency_of_the_test": 11,
    }
    plain = run(**keys, fedpara_mend=True)
    reached = accuracies(caplog)[-1]
    caplog.clear()
    coded = run(**keys, fedpara_codec=codec)
    assert accuracies(caplog)[-1] >= reached - 0.06
    assert not [text for text in warned(caplog) if "left out" in text]

    def up(outcome: Outcome) -> int:
        return sum(len(sent.data) for sent in outcome.sent if sent.direction == "up")

    assert up(coded) < up(plain)


def test_codecs_of_both_directions_and_the_grid() -> None:
    outcome = run(
        **PERSONAL,
        fedpara_uplink_codec="small",
        fedpara_downlink_codec="balanced",
        fedpara_references="grid",
        comm_round=4,
    )
    sizes = {
        way: [len(s.data) for s in outcome.sent if s.direction == way] for way in ("up", "down")
    }
    assert sum(sizes["up"]) < sum(sizes["down"])


def test_a_client_that_lost_its_reference_is_served_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    memory: list[Any] = []

    def forget(sent: Sent) -> bytes:
        if sent.direction == "down" and sent.round == 3 and len(memory) == 0:
            memory.append(sent)
            clients = holder[0].runner.clients
            clients._storages._memory[sent.client].clear()
        return sent.data

    holder: list[Any] = []
    caplog.set_level(logging.INFO)
    import fedpara_plugins_fedml.runner as module

    original = module.FedMLRunner.run
    module.FedMLRunner.run = lambda self: (holder.append(self), original(self))[1]
    try:
        outcome = run(fedpara_codec="balanced", client_num_per_round=4, tap=forget)
    finally:
        module.FedMLRunner.run = original
    third = [s for s in outcome.sent if s.round == 3 and s.client == memory[0].client]
    assert [s.direction for s in third] == ["down", "up", "down", "up"]
    assert not [text for text in warned(caplog) if "left out" in text]


# The ledger and files


def test_the_ledger_counts_every_message(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = tmp_path / "ledger.jsonl"
    outcome = run(**PERSONAL, fedpara_codec="balanced", fedpara_ledger=str(path))
    entries = Ledger.read(path)
    wanted = [(s.direction, s.round, s.client, len(s.data)) for s in outcome.sent]
    assert [(e.direction, e.round, e.client, e.encoded_bytes) for e in entries] == wanted
    dense = sum(value.numel() * 4 for value in model().state_dict().values())
    assert {entry.dense_bytes for entry in entries} == {dense}
    words = caplog.text
    assert "fedpara: round 3: up " in words
    assert "whole run: up " in words
    figures = [line for line in read_lines(path) if isinstance(line, Evaluation)]
    assert {line.metric for line in figures} == {"accuracy", "loss"}
    assert [line.value for line in figures if line.metric == "accuracy"] == accuracies(caplog)


@pytest.mark.parametrize("method", ["none", "lowrank", "fedpara", "pfedpara"])
def test_checkpoints_load_strictly_into_the_plain_model(method: str, tmp_path: Path) -> None:
    outcome = run(
        fedpara_method=method,
        fedpara_mend=True,
        fedpara_checkpoint=str(tmp_path / "server.safetensors"),
        fedpara_client_checkpoints=str(tmp_path / "clients"),
    )
    spec = outcome.runner.runner.server.spec
    files = ["server.safetensors", *(f"clients/client-{n}.safetensors" for n in range(4))]
    for name in files:
        model().load_state_dict(load_file(tmp_path / name), strict=True)
    server = load_file(tmp_path / files[0])
    for name, value in spec.dense_state(outcome.state).items():
        torch.testing.assert_close(server[name], value)
    apart = [
        name
        for name in server
        if not torch.equal(server[name], load_file(tmp_path / files[3])[name])
    ]
    assert bool(apart) == (method == "pfedpara")


# Bad clients


class Failing(ModelTrainerCLS):
    """Client 1 raises, client 2 gives NaN; others train."""

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        super().train(train_data, device, args)
        if self.id == 1:
            raise RuntimeError("the disk of this client is full")
        if self.id == 2:
            with torch.no_grad():
                next(iter(self.model.parameters()))[0] = float("nan")


def test_bad_clients_are_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    loop = FedAvgLoop(model(), dataset()[5])
    loop.sample = lambda number, a_round: [0, 3]  # type: ignore[method-assign]
    wanted = loop.run(3, 2)
    found = run(client_trainer=Failing, fedpara_mend=True, client_num_per_round=4).state
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    words = "\n".join(warned(caplog))
    for number in (1, 2, 3):
        assert f"left out client 1 in round {number}: it could not train: RuntimeError" in words
        assert f"left out client 2 in round {number}: it could not train: tensor" in words


Tensors = dict[str, Tensor]
BYTES: dict[str, Callable[[bytes, Tensors], bytes]] = {
    "cut": lambda data, tensors: data[:-100],
    "bits": lambda data, tensors: data[:-9] + bytes([data[-9] ^ 255]) + data[-8:],
    "pickle": lambda data, tensors: pickle.dumps(tensors),
}
CONTENT: dict[str, Callable[[dict[str, Any], Tensors], object]] = {
    "shape": lambda head, tensors: tensors.update({"0.weight": tensors["0.weight"][:5].clone()}),
    "names": lambda head, tensors: tensors.update(other=tensors.pop("0.weight")),
    "nan": lambda head, tensors: tensors["0.weight"].view(-1)[7].fill_(torch.inf),
    "examples": lambda head, tensors: head.update(examples=-5),
}
"""Damage to a reply: to its bytes as a whole, or to its head and its tensors."""


@pytest.mark.parametrize("damage", [*BYTES, *CONTENT])
def test_a_reply_that_cannot_be_used_is_left_out(
    damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    def tap(sent: Sent) -> bytes:
        if sent.direction == "down" or sent.client != "1":
            return sent.data
        envelope = unpack(sent.data)
        head, payload = dict(envelope.head), envelope.payloads["model"]
        tensors = dict(decode_payload(payload, limit=10**7).tensors)
        if damage in BYTES:
            return BYTES[damage](sent.data, tensors)
        CONTENT[damage](head, tensors)
        return pack(head, {"model": encode_payload(tensors, codec=parse_codec("none"))})

    loop = FedAvgLoop(model(), dataset()[5])
    loop.sample = lambda number, a_round: [0, 2, 3]  # type: ignore[method-assign]
    wanted = loop.run(2, 3)
    found = run(fedpara_mend=True, client_num_per_round=4, comm_round=2, tap=tap).state
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert len([text for text in warned(caplog) if "left out client 1" in text]) == 2


class AllFailing(ModelTrainerCLS):
    def train(self, train_data: Any, device: Any, args: Any) -> None:
        raise RuntimeError("nothing works")


def test_a_round_without_enough_answers_ends_the_run_with_the_reasons() -> None:
    with pytest.raises(FedParaError, match=r"3 usable answers.*client 1: .*disk"):
        run(
            client_trainer=OneFailing,
            fedpara_mend=True,
            client_num_per_round=4,
            fedpara_min_clients=4,
        )
    with pytest.raises(FedParaError, match=r"0 usable answers of 2.*nothing works"):
        run(client_trainer=AllFailing, fedpara_mend=True)


class OneFailing(ModelTrainerCLS):
    def train(self, train_data: Any, device: Any, args: Any) -> None:
        if self.id == 1:
            raise RuntimeError("the disk of this client is full")


def test_a_client_that_fails_keeps_its_state_as_it_was() -> None:
    """A round that fails leaves no trace: private factors are those of the last good one."""

    class FailsLate(ModelTrainerCLS):
        rounds = 0

        def train(self, train_data: Any, device: Any, args: Any) -> None:
            super().train(train_data, device, args)
            if self.id == 1 and args.round_idx == 2:
                raise RuntimeError("late")

    short = run(**PERSONAL, client_num_per_round=4, comm_round=2)
    long = run(**PERSONAL, client_num_per_round=4, comm_round=3, client_trainer=FailsLate)
    private = short.runner.runner.server.spec.private_keys
    for name in private:
        assert torch.equal(short.kept(1)[name], long.kept(1)[name])
        assert not torch.equal(short.kept(0)[name], long.kept(0)[name])


def test_an_error_of_configuration_on_a_client_ends_the_run() -> None:
    class Wrong(ModelTrainerCLS):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            raise ConfigError("the learning rate must be a number")

    with pytest.raises(ConfigError, match="client 2: the learning rate must be a number"):
        run(client_trainer=Wrong, fedpara_mend=True)
