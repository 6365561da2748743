"""Apps that exchange parts of their model, with the README's lines in place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpara_plugins import FedParaError
from fedpara_plugins.codecs.description import NO_DESCRIPTION
from harness.flower.apps import Outcome, federate
from harness.flower.legacy_apps import LegacyExperiment, legacy_plain_apps, legacy_plugin_apps
from harness.flower.part_apps import (
    PARTS,
    Adapted,
    Backbone,
    Part,
    encoder_and_classifier,
    part_apps,
)
from harness.oracles.descriptions import peek_header
from harness.oracles.task import TrainingTask

SMALL = [name for name in PARTS if name != "whole"]


def section(method: str, codec: str, **options: Any) -> dict[str, Any]:
    options = {"method": method, "gamma": 0.3, "min_size": 256, "codec": codec, **options}
    return {f"fedpara.{key}": value for key, value in options.items()}


def methods(outcome: Outcome, record: str) -> set[str]:
    """Return the methods of the weights that a record of the last message describes."""
    model = peek_header(outcome.sent[-1].payloads[record]).model
    assert model is not None
    return {row[1] for row in model["weights"]}


@pytest.mark.parametrize("name", SMALL)
def test_a_part_without_a_method_is_averaged_as_without_the_plugin(name: str) -> None:
    coded = federate(part_apps(PARTS[name]), section("none", "lossless"))
    plain = federate(part_apps(PARTS[name], plugin=False))
    assert coded.state.keys() == plain.state.keys()
    for key, value in plain.state.items():
        assert torch.equal(coded.state[key], value), key


@pytest.mark.parametrize("method", ["fedpara", "pfedpara"])
@pytest.mark.parametrize("name", SMALL)
def test_a_method_applies_to_what_is_sent_and_factorised(name: str, method: str) -> None:
    outcome = federate(part_apps(PARTS[name]), section(method, "small"))
    assert not [line for line in outcome.log if "left out" in line]
    for record in outcome.sent[-1].payloads:
        frozen = name == "adapter" or (name, record) == ("two_parts", "encoder")
        assert methods(outcome, record) == (set() if frozen else {method})
    assert all(torch.isfinite(value).all() for value in outcome.state.values())


def test_later_messages_are_updates_of_the_part() -> None:
    outcome = federate(part_apps(PARTS["head"], rounds=3), section("fedpara", "small"))
    down = [sent for sent in outcome.sent if sent.direction == "down"]
    assert peek_header(down[-1].payloads["arrays"]).codec.startswith("delta")
    assert down[-1].array_bytes < down[0].array_bytes / 2


@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
def test_the_checkpoint_of_a_part_is_dense(method: str, tmp_path: Path) -> None:
    path = tmp_path / "server.safetensors"
    apps = part_apps(PARTS["head"], evaluates=True)
    federate(apps, section(method, "none", checkpoint=str(path)))
    assert set(load_file(path)) == {"head.weight", "head.bias"}


def test_the_ledger_counts_the_part(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    federate(part_apps(PARTS["head"]), section("fedpara", "small", ledger=str(path)))
    text = path.read_text()
    dense = 4 * (48 * 32 + 32)
    assert f'"dense_bytes": {dense}' in text or f'"dense_bytes":{dense}' in text


class Prompted(nn.Module):
    """A model whose app sends what has no name in its state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


APART = Part(
    Prompted,
    lambda m: {"arrays": {"prompt": m.layer.weight.detach().clone()}},
    lambda m, r: m.layer.weight.data.copy_(r["arrays"]["prompt"]) if m.layer.bias is None else None,
)


def test_what_is_no_part_of_the_model_is_coded_and_one_line_says_so() -> None:
    outcome = federate(part_apps(APART), section("fedpara", "small"))
    lines = [line for line in outcome.log if "cannot be told which part" in line]
    assert len(lines) == 1
    assert methods(outcome, "arrays") == set()


def test_what_is_no_part_of_a_model_with_private_parts_is_refused() -> None:
    with pytest.raises(FedParaError, match="a part of the model is private"):
        federate(part_apps(APART), section("pfedpara", "small"))


def test_a_model_of_frozen_weights_and_an_adapter_is_kept_and_one_line_says_so() -> None:
    outcome = federate(part_apps(Part(Adapted, *_of("adapter"))), section("fedpara", "small"))
    lines = [line for line in outcome.log if "the codec alone acts" in line]
    assert len(lines) <= 1  # once in a process
    assert all(len(line) < 700 for line in lines)


def _of(name: str) -> tuple[Any, Any]:
    return PARTS[name].records, PARTS[name].load


def test_an_error_about_plain_arrays_advises_no_line_that_is_there() -> None:
    plain = Part(
        Backbone,
        lambda m: {"arrays": dict(Backbone().state_dict())},
        lambda m, r: None,
    )
    with pytest.raises(FedParaError) as caught:
        federate(part_apps(plain), section("fedpara", "small"))
    assert "builds the plain model" in str(caught.value)
    assert "Net = fedpara.factorised(Net)" not in str(caught.value)


class Tuned(TrainingTask):
    """A task whose first layer is frozen."""

    @property
    def net(self) -> Any:
        """Return what builds the model."""
        plain = super().net

        def build() -> nn.Module:
            torch.manual_seed(0)  # what is not sent has to be the same
            model: nn.Module = plain()
            next(model.parameters()).requires_grad_(False)
            return model

        return build


@pytest.mark.parametrize("part", ["trained", "state"])
@pytest.mark.parametrize("method", ["none", "fedpara"])
def test_lists_of_the_legacy_api(method: str, part: str) -> None:
    experiment = LegacyExperiment(task=Tuned(clients=2, rounds=2, epochs=1), part=part)
    outcome = federate(legacy_plugin_apps(experiment), section(method, "lossless"))
    plain = federate(legacy_plain_apps(experiment))
    assert not [line for line in outcome.log if "left out" in line]
    if method == "none":
        assert outcome.losses == pytest.approx(plain.losses, rel=1e-5)
    else:
        assert len(outcome.losses) == len(plain.losses)


def _adapted(rank: int) -> nn.Module:
    model = Adapted()
    model.lora_A = nn.ModuleDict({"default": nn.Linear(32, rank, bias=False)})
    model.lora_B = nn.ModuleDict({"default": nn.Linear(rank, 32, bias=False)})
    return model


@pytest.mark.parametrize("method", ["none", "lowrank"])
@pytest.mark.parametrize("loads", [True, False])
def test_adapters_of_different_ranks_are_refused_with_both(loads: bool, method: str) -> None:
    records, load = _of("adapter")
    part = Part(lambda: _adapted(8), records, load if loads else lambda m, r: None)
    apps = part_apps(part, client_factory=lambda: _adapted(4))
    words = "model has rank 4, the server's has" if loads else "of rank 4, this server sent one of"
    with pytest.raises(FedParaError, match=f"{words} rank 8"):
        federate(apps, section(method, "small"))


@pytest.mark.parametrize("base", ["frozen", "factors"])
def test_updates_of_different_ranks_are_refused_with_both(base: str) -> None:
    """Factors of the plugin, by another gamma."""
    options = {"base": base, "trained": "discard"} if base == "factors" else {"base": base}
    apps = part_apps(PARTS["whole"])
    server, client = (
        section("lowrank", "small", **options) | {"fedpara.gamma": gamma} for gamma in (0.6, 0.1)
    )
    with pytest.raises(
        FedParaError, match=r"this client has .*rank \d+ .* the server has .*rank \d"
    ):
        federate(apps, server, client_config=client)


def test_headers_of_later_messages_refer_to_descriptions_in_both_directions() -> None:
    outcome = federate(part_apps(PARTS["head"], rounds=3), section("fedpara", "small"))
    down = [sent.payloads["arrays"] for sent in outcome.sent if sent.direction == "down"]
    up = [sent.payloads["arrays"] for sent in outcome.sent if sent.direction == "up"]
    for payload in (*down[2:], *up):  # two clients
        assert peek_header(payload).description not in (None, NO_DESCRIPTION)


@pytest.mark.parametrize("codec", ["lossless", "small"])
def test_all_records_travel_as_one_array(codec: str) -> None:
    joint = federate(part_apps(PARTS["two_models"], rounds=3), section("none", codec))
    assert not [line for line in joint.log if "left out" in line]
    first = [sent for sent in joint.sent if sent.direction == "down"][:2]  # nothing is known yet
    for sent in joint.sent:
        names = {"encoder", "classifier"} if sent in first else {"fedpara_joint"}
        assert set(sent.content.array_records) == names
        assert list(sent.payloads) == ["encoder", "classifier"]
        if sent not in first:
            # Next to NumPy's 128 bytes and the checksums, a record takes what the values take.
            assert sent.array_bytes < sum(map(len, sent.payloads.values())) + 128


@pytest.mark.parametrize("damage", [b"FPP3", b"", b"FPP3" + bytes(60), b"FPP2" + bytes(60)])
def test_a_damaged_payload_of_all_records_is_left_out(damage: bytes) -> None:
    def forge(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if context.node_config["partition-id"] == 1:
            array = Array(np.frombuffer(damage, dtype=np.uint8))
            reply.content["fedpara_joint"] = ArrayRecord({"fedpara.payload": array})
        return reply

    outcome = federate(part_apps(PARTS["two_models"], mods=[forge]), section("none", "small"))
    lines = [line for line in outcome.log if "left out the reply" in line]
    word = re.compile("not a joint payload|not a payload|damaged")
    assert len(lines) == 2
    assert all(word.search(line) for line in lines)


def _trained_encoder_and_classifier() -> tuple[nn.Module, nn.Module]:
    """Return two models that share names, of which the first looks trained."""
    encoder, classifier = encoder_and_classifier()
    with torch.no_grad():
        encoder[0].weight.add_(torch.randn(48, 1) @ torch.randn(1, 32))  # type: ignore[index]
    return encoder, nn.Sequential(classifier, nn.ReLU(), nn.Linear(32, 32))


def _encoded() -> Tensor:
    out: Tensor = _trained_encoder_and_classifier()[0](torch.ones(1, 32))
    return out.detach()


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_an_encoder_beside_the_classifier_that_is_sent_stays_as_it_is(method: str) -> None:
    encoded = []

    def load(models: Any, records: Any) -> None:
        encoded.append(models[0](torch.ones(1, 32)).detach())
        models[1].load_state_dict(records["arrays"])
        models[0].requires_grad_(False)

    part = Part(_trained_encoder_and_classifier, lambda m: {"arrays": m[1].state_dict()}, load)
    outcome = federate(part_apps(part, rounds=3), section(method, "small", clip="relative"))
    assert methods(outcome, "arrays") == {method}
    assert not [name for name in outcome.state if name.endswith("_base")]
    assert len(encoded) == 6
    for found in encoded:
        torch.testing.assert_close(found, _encoded())


def test_models_of_which_none_is_described_are_refused() -> None:
    records = PARTS["two_models"].records
    part = Part(encoder_and_classifier, records, PARTS["two_models"].load)

    def others() -> Any:
        return nn.Sequential(nn.Conv1d(32, 48, 3)), nn.Sequential(nn.Conv1d(48, 32, 3))

    with pytest.raises(FedParaError, match="this client has"):
        federate(part_apps(part, client_factory=others), section("fedpara", "small"))


class Pretrained(nn.Module):
    """A model whose weight looks trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(64, 64)
        with torch.no_grad():
            self.layer.weight += torch.outer(torch.linspace(-1, 1, 64), torch.linspace(-2, 2, 64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        out: Tensor = self.layer(x)
        return out


class Fresh(nn.Module):
    """A fresh one with the same name and shape in it, and another layer."""

    def __init__(self, deviation: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(64, 64)
        self.last = nn.Linear(64, 64)
        with torch.no_grad():
            self.layer.weight *= deviation

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        out: Tensor = self.last(self.layer(x))
        return out


class Wide(Pretrained):
    """The same as the trained one, and fresh."""

    def __init__(self) -> None:
        super().__init__()
        self.layer.reset_parameters()


def two(first: Any, second: Any) -> Part:
    return Part(
        lambda: (first(), second()),
        lambda m: {"encoder": m[0].state_dict(), "decoder": m[1].state_dict()},
        lambda m, r: (m[0].load_state_dict(r["encoder"]), m[1].load_state_dict(r["decoder"])),
    )


def rows(outcome: Outcome, record: str) -> dict[str, Any]:
    model = peek_header(outcome.sent[-1].payloads[record]).model
    assert model is not None
    return {row[0]: row[1:] for row in model["weights"]}


@pytest.mark.parametrize("turned", [False, True])
def test_each_of_two_models_has_the_form_that_its_own_weights_ask_for(turned: bool) -> None:
    """One looks trained, and gets an update; the other is fresh, and gets factors."""
    models = (Fresh, Pretrained) if turned else (Pretrained, Fresh)
    outcome = federate(part_apps(two(*models), inputs=64, rate=1e-4), section("fedpara", "small"))
    assert not [line for line in outcome.log if "left out" in line]
    names = ("decoder", "encoder") if turned else ("encoder", "decoder")
    trained, fresh = (rows(outcome, name) for name in names)
    assert [row[6:] != [] for row in trained.values()] == [True]
    assert [row[6:] for row in fresh.values()] == [[], []]


def test_each_of_two_models_has_the_plan_of_its_own_variance() -> None:
    factories = (lambda: Fresh(4.0), Wide)
    outcome = federate(
        part_apps(two(*factories), inputs=64, rate=1e-4), section("fedpara", "small", init="fit")
    )
    assert not [line for line in outcome.log if "left out" in line]
    wide, own = (rows(outcome, name)["layer.weight"][3] for name in ("encoder", "decoder"))
    assert wide != own
