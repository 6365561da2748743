"""An app that exchanges two records of one model: a client keeps one private state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

import fedpara_plugins as core
import fedpara_plugins_flower as fedpara
from harness.cells.flower import GAMMA
from harness.flower.apps import Apps, federate
from harness.oracles.task import TrainingTask, train

TASK = TrainingTask(clients=2, rounds=2, epochs=1)
SECTION = {"fedpara.method": "pfedpara", "fedpara.gamma": GAMMA}


def _apps(second: Any, replies: list[Message], states: list[dict[str, Tensor]]) -> Apps:
    """Return an app of two rounds: a client trains the first record, ``second`` makes the other."""
    net = fedpara.factorised(TASK.net)

    def client_app() -> ClientApp:
        app = ClientApp(mods=[fedpara.client_mod])

        @app.train()
        def fit(message: Message, context: Context) -> Message:
            content: Any = message.content
            model = net()
            model.load_state_dict(content["arrays"].to_torch_state_dict())
            if int(context.node_config["partition-id"]) == 0:
                states.append({k: v.clone() for k, v in core.split(model).private.items()})
            given = content["ema"].to_torch_state_dict()
            train(model, TASK.batches(0, 1), lr=TASK.lr)
            answer = {
                "arrays": ArrayRecord(model.state_dict()),
                "ema": ArrayRecord(second(model, given)),
                "metrics": MetricRecord({"num-examples": 1}),
            }
            return Message(RecordDict(answer), reply_to=message)

        return app

    def server_app(outcome: Any) -> ServerApp:
        app = fedpara.server_app(ServerApp())

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            torch.manual_seed(TASK.seed)
            arrays = ArrayRecord(net().state_dict())
            for number in (1, 2):
                content = RecordDict({"arrays": arrays, "ema": arrays})
                content["config"] = ConfigRecord({"server-round": number})
                messages = [
                    Message(content, dst_node_id=node, message_type="train")
                    for node in grid.get_node_ids()
                ]
                replies[:] = grid.send_and_receive(messages)

        return app

    return Apps(client_app, server_app, TASK.clients)


def _run(second: Any) -> tuple[list[Message], list[dict[str, Tensor]]]:
    replies: list[Message] = []
    states: list[dict[str, Tensor]] = []
    federate(_apps(second, replies, states), SECTION)
    return replies, states


SOUND = {
    "the same": lambda model, given: model.state_dict(),
    "shared alone": lambda model, given: core.split(model).shared,
}


@pytest.mark.parametrize("name", SOUND)
def test_one_private_state_is_kept(name: str) -> None:
    replies, states = _run(SOUND[name])
    assert not [reply for reply in replies if reply.has_error()]
    # The second round starts from what the first has trained.
    first, second = states
    assert any((second[key] - value).abs().max() > 1e-4 for key, value in first.items())


def test_two_that_differ_end_the_run_in_its_first_round_with_what_to_do() -> None:
    with pytest.raises(core.FedParaError) as caught:
        _run(lambda model, given: given)
    assert "records 'arrays' and 'ema' of the reply are of one model" in str(caught.value)
    assert "private names in the trained record alone" in str(caught.value)
