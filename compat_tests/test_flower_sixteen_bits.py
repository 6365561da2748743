"""Models in bfloat16 and float16: their dtype in messages and at the app's end, and its errors."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

import fedpara_plugins_flower as fedpara
from fedpara_plugins import ConfigError
from fedpara_plugins.codecs import encode_payload, parse_codec
from fedpara_plugins_flower.messages.records import to_record, to_tensors
from harness.flower.apps import Apps, federate

CLIENTS = 2


def _net(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Linear(16, 4)).to(dtype)


def _apps(dtype: torch.dtype, seen: list[Any], *, makes: Any = fedpara.arrays) -> Apps:
    """Return an app of two rounds whose client i adds (i + 1) / 128 to every weight."""

    def client_app() -> ClientApp:
        app = ClientApp(mods=[fedpara.client_mod])

        @app.train()
        def fit(message: Message, context: Context) -> Message:
            content: Any = message.content
            received = content["arrays"].to_torch_state_dict()
            model = _net(dtype)
            model.load_state_dict(received)
            seen.append(received)
            step = (int(context.node_config["partition-id"]) + 1) / 128
            with torch.no_grad():
                for value in model.parameters():
                    value += step
            answer = {
                "arrays": makes(model.state_dict()),
                "metrics": MetricRecord({"num-examples": 1}),
            }
            return Message(RecordDict(answer), reply_to=message)

        return app

    def server_app(outcome: Any) -> ServerApp:
        app = fedpara.server_app(ServerApp())

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            strategy = FedAvg(fraction_evaluate=0.0, min_available_nodes=CLIENTS)
            initial = fedpara.arrays(_net(dtype).state_dict())
            result = strategy.start(grid=grid, initial_arrays=initial, num_rounds=2)
            outcome.state = result.arrays.to_torch_state_dict()

        return app

    return Apps(client_app, server_app, CLIENTS)


@pytest.mark.parametrize("codec", ["lossless", "balanced", "small"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_keeps_its_dtype_at_the_apps_end(dtype: torch.dtype, codec: str) -> None:
    seen: list[Any] = []
    outcome = federate(_apps(dtype, seen), {"fedpara.codec": codec})
    assert len(seen) == 2 * CLIENTS
    start = _net(dtype).state_dict()
    for state in seen:
        assert {k: v.dtype for k, v in state.items()} == {k: v.dtype for k, v in start.items()}
    # Both clients' mean step is 3/256; 16 bits of a sum of weights of about 0.2 hold 1/1024.
    first = [state["2.weight"].float() for state in seen[:CLIENTS]]
    last = [state["2.weight"].float() for state in seen[CLIENTS:]]
    assert all(torch.allclose(x, first[0]) for x in first)
    assert all((x - first[0] - 3 / 256).abs().max() < 1 / 200 for x in last)
    assert (outcome.state["2.weight"].float() - first[0] - 6 / 256).abs().max() < 1 / 100


def test_lossless_messages_carry_two_bytes_a_value() -> None:
    state = {"w": torch.randn(100, 100).bfloat16()}
    coded = encode_payload(to_tensors(fedpara.arrays(state)), codec=parse_codec("none"))
    assert 20_000 < len(coded) < 21_000


@pytest.mark.parametrize("shape", [(3, 5), (0, 2), ()])
def test_a_record_gives_back_every_bit(shape: tuple[int, ...]) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    few = bits[: max(1, int(torch.tensor(shape).prod()))]
    state = {
        "all": bits[torch.isfinite(bits)],
        "few": few[: int(torch.tensor(shape).prod())].reshape(shape) if shape else few[0],
        "half": torch.randn(4).half(),
        "steps": torch.tensor(7),
    }
    for record in (fedpara.arrays(state), to_record(state)):
        for back in (record.to_torch_state_dict(), to_tensors(record)):
            assert list(back) == list(state)
            for name, value in state.items():
                assert back[name].dtype == value.dtype
                assert torch.equal(back[name], value)


def test_strategies_see_float32() -> None:
    record = fedpara.arrays({"w": torch.tensor([0.5, 1.0]).bfloat16()})
    assert record["w"].numpy().dtype == "float32"
    assert ArrayRecord(dict(record.items())).to_torch_state_dict()["w"].dtype == torch.float32


def test_what_no_record_can_hold_is_named() -> None:
    with pytest.raises(ConfigError, match=r"tensor .w. of dtype torch\.float8_e5m2"):
        fedpara.arrays({"w": torch.zeros(2).to(torch.float8_e5m2)})


def test_a_server_whose_own_code_makes_the_record_is_told_what_to_write() -> None:
    def server_app(outcome: Any) -> ServerApp:
        app = fedpara.server_app(ServerApp())

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            ArrayRecord(_net(torch.bfloat16).state_dict())

        return app

    apps = Apps(_apps(torch.bfloat16, []).client, server_app, CLIENTS)
    with pytest.raises(ConfigError, match=r"Write fedpara.arrays\(model.state_dict\(\)\)"):
        federate(apps, {"fedpara.codec": "small"})


def test_a_client_whose_own_code_makes_the_record_is_told_what_to_write() -> None:
    apps = _apps(torch.bfloat16, [], makes=ArrayRecord)
    outcome = federate(apps, {"fedpara.codec": "small"}, raises=False)
    replies = [each.message for each in outcome.sent if each.direction == "up"]
    assert replies
    for reply in replies:
        assert "Write fedpara.arrays(model.state_dict())" in reply.error.reason


def test_a_record_travels_and_is_pickled_as_flowers_own() -> None:
    """SuperLinks know Flower's classes alone, by the name that stands before a record's bytes."""
    record = fedpara.arrays({"w": torch.ones(2, dtype=torch.bfloat16)})
    again = pickle.loads(pickle.dumps(record))
    assert record.deflate().startswith(b"ArrayRecord ")
    assert again.to_torch_state_dict()["w"].dtype == torch.bfloat16
