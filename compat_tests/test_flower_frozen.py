"""Frozen parameters, which both sides hold, are in no message; apps see whole states."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedpara_plugins import FedParaError
from harness.flower.apps import Outcome, federate
from harness.flower.part_apps import PARTS, Backbone, Part, part_apps
from harness.oracles.descriptions import decode_payload

WHOLE = PARTS["whole"]
FROZEN = ("body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias")


def section(codec: str = "lossless", method: str = "none", **options: Any) -> dict[str, Any]:
    options = {"method": method, "gamma": 0.3, "min_size": 256, "codec": codec, **options}
    return {f"fedpara.{key}": value for key, value in options.items()}


def sent_names(outcome: Outcome) -> set[str]:
    """Return the names of all tensors in models' payloads of a run without deltas."""
    return {
        name
        for sent in outcome.sent
        for record, payload in sent.payloads.items()
        if not record.startswith("fedpara_frozen_")
        for name in decode_payload(payload, limit=10**7).tensors
    }


def once(outcome: Outcome) -> list[int]:
    """Return the clients that were sent the frozen tensors."""
    return [s.partition for s in outcome.sent if "fedpara_frozen_arrays" in s.payloads]


def with_body(change: Any) -> Part:
    """Return the app whose clients' body is another."""

    def factory() -> nn.Module:
        model = Backbone()
        change(model)
        return model

    return dataclasses.replace(WHOLE, factory=factory)


def drawn_anew(model: nn.Module) -> None:
    torch.manual_seed(torch.seed())
    for layer in model.body:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()


def trained(model: nn.Module) -> None:
    with torch.no_grad():
        weight = model.body[0].weight
        weight += torch.outer(torch.linspace(-1, 1, 48), torch.linspace(-2, 2, 32))


@pytest.mark.parametrize("method", ["none", "fedpara", "pfedpara"])
def test_frozen_parameters_are_in_no_message_and_the_result_is_the_same(method: str) -> None:
    left_out = federate(part_apps(WHOLE), section(method=method))
    sent = federate(part_apps(WHOLE), section(method=method, send="all"))
    assert not sent_names(left_out) & set(FROZEN)
    assert sent_names(sent) >= set(FROZEN)
    assert not once(left_out)
    assert left_out.state.keys() == sent.state.keys()
    for name, value in sent.state.items():
        assert torch.equal(left_out.state[name], value), name
    lines = [line for line in left_out.log if "are frozen and not sent" in line]
    assert len(lines) == 1


def test_nothing_changes_with_method_and_codec_none() -> None:
    plain = federate(part_apps(WHOLE, plugin=False))
    off = federate(part_apps(WHOLE), section("none"))
    assert [s.array_bytes for s in off.sent] == [s.array_bytes for s in plain.sent]


def test_a_model_that_is_frozen_after_it_was_built() -> None:
    def records(model: Any) -> dict[str, dict[str, Tensor]]:
        model.body.requires_grad_(False)
        return {"arrays": model.state_dict()}

    part = Part(lambda: Backbone(freezes=False), records, WHOLE.load)
    apps = part_apps(part, client_factory=Backbone)
    assert not sent_names(federate(apps, section())) & set(FROZEN)


@pytest.mark.parametrize("reads_first", [False, True])
def test_frozen_parameters_that_clients_draw_anew_travel_once(reads_first: bool) -> None:
    apps = part_apps(
        WHOLE, client_factory=with_body(drawn_anew).factory, reads_first=reads_first, rounds=3
    )
    outcome = federate(apps, section())
    assert sorted(once(outcome)) == [0, 1]
    expected = federate(part_apps(WHOLE, rounds=3), section(send="all"))
    for name, value in expected.state.items():
        assert torch.equal(outcome.state[name], value), name
    assert len([line for line in outcome.log if "they travel once" in line]) == 2
    assert not [line for line in outcome.log if "to 4 clients" in line]


def test_a_client_without_a_model_of_the_plugins_gets_them_once() -> None:
    plain = Backbone

    def factory() -> nn.Module:
        return plain()

    apps = part_apps(WHOLE, client_factory=factory, client_factorised=False, rounds=3)
    outcome = federate(apps, section())
    assert sorted(once(outcome)) == [0, 1]


def test_a_client_whose_trained_frozen_part_differs_is_refused_with_both_hashes() -> None:
    apps = part_apps(WHOLE, client_factory=with_body(trained).factory)
    with pytest.raises(FedParaError, match=r"'body\.0\.weight'.*hash [0-9a-f]{32}.*[0-9a-f]{32}"):
        federate(apps, section())


def test_one_such_client_does_not_end_the_run() -> None:
    calls = iter(range(100))

    def factory() -> nn.Module:
        model = Backbone()
        if next(calls) % 2:
            trained(model)
        return model

    outcome = federate(part_apps(WHOLE, client_factory=factory), section())
    assert outcome.state


def test_a_client_that_trains_what_is_frozen_on_the_server_is_told() -> None:
    apps = part_apps(WHOLE, client_factory=lambda: Backbone(freezes=False))
    with pytest.raises(FedParaError, match=r'has changed .*send = "all"'):
        federate(apps, section())


def test_the_ledger_counts_frozen_tensors_as_dense_bytes_alone(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    federate(part_apps(WHOLE), section("none", "fedpara", ledger=str(path)))
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    layers = {e["layer"]: e for e in entries if "layer" in e}
    assert layers["body.0"]["raw_bytes"] == 0
    assert layers["body.0"]["dense_bytes"] == 4 * (32 * 48 + 48)
    whole = 4 * (32 * 48 + 48 + 48 * 48 + 48 + 2 * 48 + 48 * 32 + 32)
    messages = [e for e in entries if "direction" in e]
    assert messages
    assert all(e["dense_bytes"] == whole and e["raw_bytes"] < whole / 2 for e in messages)


class Tabled(nn.Module):
    """A table that no training changes, and a norm whose statistics all training changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 32)
        self.norm = nn.BatchNorm1d(32)
        self.register_buffer("table", torch.arange(128.0).sin())
        self.register_buffer("places", torch.arange(96))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed outputs, moved by the table."""
        out: Tensor = self.norm(self.layer(x)) + self.table[:32]  # type: ignore[index]
        return out


class Counting(Tabled):
    """The same; places move on with each training step, as those of a queue do."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs."""
        if self.training:
            self.places.copy_(self.places + 1)  # type: ignore[operator]
        return super().forward(x)


def tabled(factory: Any) -> Part:
    return Part(
        factory,
        lambda m: {"arrays": m.state_dict()},
        lambda m, r: m.load_state_dict(r["arrays"]),
    )


@pytest.mark.parametrize("method", ["none", "fedpara"])
def test_buffers_that_nobody_changes_are_in_no_message(method: str) -> None:
    left_out = federate(part_apps(tabled(Tabled)), section(method=method))
    sent = federate(part_apps(tabled(Tabled)), section(method=method, send="all"))
    assert not sent_names(left_out) & {"table", "places"}
    assert sent_names(left_out) >= {"norm.running_mean", "norm.num_batches_tracked"}
    assert not once(left_out)
    for name, value in sent.state.items():
        assert torch.equal(left_out.state[name], value), name


def test_a_buffer_that_clients_change_is_heard_and_sent_from_then_on() -> None:
    left_out = federate(part_apps(tabled(Counting), rounds=3), section())
    sent = federate(part_apps(tabled(Counting), rounds=3), section(send="all"))
    for name, value in sent.state.items():
        assert torch.equal(left_out.state[name], value), name
    changed = [s.round for s in left_out.sent if "fedpara_changed_arrays" in s.payloads]
    assert changed == [1, 1]
    assert any("this client has changed 1 buffers" in line for line in left_out.log)
