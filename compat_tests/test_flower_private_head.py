"""The private head and the label counts through Flower: kept on the client, used, and exported."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fedpara_plugins_flower as fedpara
from fedpara_plugins.codecs import reference_hash
from fedpara_plugins.references.version_zero import reference_from_header
from harness.cells.flower import CODECS
from harness.flower.apps import Experiment, Hooks, Outcome, federate, plugin_apps
from harness.oracles.descriptions import decode_payload, peek_header
from harness.oracles.task import TrainingTask
from harness.processes.canaries import Canaries

State = dict[str, Tensor]

TASK = TrainingTask(rounds=3, epochs=1)
ADDED = ("fc2.correction", "fc2.label_prior")
MIN_SIZES = pytest.mark.parametrize("min_size", [1024, 256], ids=["dense", "factorised"])


def _labels(client: int) -> list[int]:
    return [int(label) for _, labels in TASK.batches(client, 1) for label in labels]


def _prior(client: int) -> Tensor:
    """Compute the formula by counting in Python."""
    labels = _labels(client)
    counts = [labels.count(k) for k in range(10)]
    return torch.tensor([math.log((n + 0.1) / (len(labels) + 1)) for n in counts])


class Diary:
    """Hooks that give the counts once, in the first round, and note what each client held."""

    def __init__(self) -> None:
        self.before: dict[tuple[int, int], State] = {}
        self.after: dict[tuple[int, int], State] = {}
        self.logits: dict[int, Tensor] = {}

    def loaded(self, model: nn.Module, client: int, server_round: int) -> None:
        self.before[client, server_round] = _copy(model)
        if server_round == 1:
            fedpara.set_label_counts(model, _labels(client))

    def trained(self, model: nn.Module, client: int, server_round: int) -> None:
        self.after[client, server_round] = _copy(model)

    def evaluated(self, model: nn.Module, client: int, server_round: int) -> None:
        self.logits[client] = _logits(model)


def _copy(model: nn.Module) -> State:
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(TASK.test_data()[0])
    return logits


def _federate(diary: Diary, codec: str = "none", min_size: int = 1024, **paths: Path) -> Outcome:
    section: dict[str, str | float] = {
        "fedpara.method": "pfedpara",
        "fedpara.gamma": 0.3,
        "fedpara.codec": codec,
        "fedpara.min-size": min_size,
        "fedpara.schedule": "decoupled",
        "fedpara.first-private-steps": 4,
        "fedpara.private-head": True,
        "fedpara.label-prior": "true",
    }
    section |= {f"fedpara.{key.replace('_', '-')}": str(path) for key, path in paths.items()}
    hooks = Hooks(loaded=diary.loaded, trained=diary.trained, evaluated=diary.evaluated)
    return federate(plugin_apps(Experiment(TASK, hooks=hooks)), section)


@MIN_SIZES
def test_no_byte_of_the_private_parts_is_on_the_wire(min_size: int) -> None:
    diary = Diary()
    outcome = _federate(diary, min_size=min_size)
    added = Canaries((state[key] for state in diary.after.values() for key in ADDED), most=2000)
    assert len(added) > 5000
    everything = b"|".join(sent.data for sent in outcome.sent)
    assert added.found_in(everything) == 0
    # The positive controls: the same search finds the shared bias there, and them at the clients.
    for state in diary.after.values():
        control = Canaries([state["fc2.bias"]])
        assert control.found_in(everything) == len(control)
    for client in range(TASK.clients):
        kept = b"".join(
            bytes(array.data)
            for record in outcome.grid.client_state(client).array_records.values()
            for array in record.values()
        )
        last = Canaries(diary.after[client, TASK.rounds][key] for key in ADDED)
        assert last.found_in(kept) == len(last)


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("codec", CODECS)
def test_messages_hold_the_shared_names_only(codec: str) -> None:
    outcome = _federate(Diary(), codec)
    held: dict[str, State] = {}
    seen = 0
    for sent in outcome.sent:
        for record in sent.arrays.values():
            (array,) = record.values()
            payload = array.numpy().tobytes()
            header = peek_header(payload)
            base = reference_from_header(header.extra, header.model, limit=10**7)
            known = held if base is None else {base.reference: base.tensors}
            tensors = decode_payload(payload, references=known, limit=10**7).tensors
            held[reference_hash(tensors)] = tensors
            assert {"fc2.weight", "fc2.bias"} <= tensors.keys()
            assert not tensors.keys() & {*ADDED, "fc1.x2", "fc1.y2"}
            seen += 1
    assert seen == 3 * TASK.rounds * TASK.clients


@MIN_SIZES
def test_they_stay_with_the_client_and_train(min_size: int) -> None:
    diary = Diary()
    outcome = _federate(diary, min_size=min_size)
    for client in range(TASK.clients):
        first = diary.before[client, 1]
        assert not any(bool(first[key].any()) for key in ADDED)
        for server_round in range(1, TASK.rounds + 1):
            after = diary.after[client, server_round]
            torch.testing.assert_close(after["fc2.label_prior"], _prior(client))
            before = diary.before[client, server_round]
            assert not torch.equal(after["fc2.correction"], before["fc2.correction"])
            if server_round > 1:
                earlier = diary.after[client, server_round - 1]
                assert all(torch.equal(before[key], earlier[key]) for key in ADDED)
    assert not any(bool(outcome.state[key].any()) for key in ADDED)  # the server's own, untouched
    assert outcome.losses[-1] < outcome.losses[0]


@MIN_SIZES
def test_checkpoints_of_clients_fold_them_and_the_server_s_has_none(
    min_size: int, tmp_path: Path
) -> None:
    diary, path = Diary(), tmp_path / "server.safetensors"
    outcome = _federate(diary, min_size=min_size, checkpoint=path, client_checkpoints=tmp_path)
    for client, expected in diary.logits.items():
        net = TASK.net()
        state = load_file(tmp_path / f"client-{client}.safetensors")
        net.load_state_dict(state, strict=True)
        torch.testing.assert_close(_logits(net), expected, atol=1e-4, rtol=0)
        gap = state["fc2.bias"] - outcome.state["fc2.bias"]
        torch.testing.assert_close(gap, _prior(client), atol=1e-5, rtol=0)
    server = load_file(path)
    assert server.keys() == TASK.net().state_dict().keys()
    assert torch.equal(server["fc2.bias"], outcome.state["fc2.bias"])
    if min_size == 1024:
        assert torch.equal(server["fc2.weight"], outcome.state["fc2.weight"])
