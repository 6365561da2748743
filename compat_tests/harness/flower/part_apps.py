"""Apps that exchange parts of a model: a head, what is trained, an adapter, several records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

import fedpara_plugins_flower as fedpara
from harness.flower.apps import Apps, Outcome

__all__ = ["PARTS", "Adapted", "Backbone", "Part", "encoder_and_classifier", "part_apps"]

State = dict[str, Tensor]
Records = Mapping[str, State]


class Backbone(nn.Module):
    """A frozen body, a norm and a head inside of a module."""

    def __init__(self, *, freezes: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 48))
        self.norm = nn.LayerNorm(48)
        self.heads = nn.Module()
        self.heads.head = nn.Linear(48, 32)
        for parameter in self.body.parameters() if freezes else ():
            parameter.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the head."""
        out: Tensor = self.heads.head(self.norm(self.body(x)))
        return out


class Adapted(nn.Module):
    """A frozen layer with an adapter under PEFT's names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(32, 32).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(32, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, 32, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the layer and the adapter."""
        out: Tensor = self.layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return out


def encoder_and_classifier() -> tuple[nn.Module, nn.Module]:
    """Return two models, as the factory of Flower's example of Whisper does."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU()), nn.Linear(48, 32)


@dataclass(frozen=True)
class Part:
    """What an app exchanges of what its factory builds.

    Attributes:
        factory: builds the model, or several.
        records: returns the records that are sent.
        load: loads what was received.
    """

    factory: Callable[[], Any]
    records: Callable[[Any], Records]
    load: Callable[[Any, Records], Any]


def _trained(model: nn.Module) -> Records:
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"arrays": trained}


def _adapter(model: nn.Module) -> Records:
    state = model.state_dict()
    return {"arrays": {k.replace(".default", ""): v for k, v in state.items() if "lora_" in k}}


def _load_adapter(model: nn.Module, records: Records) -> None:
    named = {k.replace(".weight", ".default.weight"): v for k, v in records["arrays"].items()}
    model.load_state_dict(named, strict=False)


def _load_both(models: Sequence[nn.Module], records: Records) -> None:
    for model, state in zip(models, records.values(), strict=True):
        model.load_state_dict(state)


PARTS = {
    "head": Part(
        Backbone,
        lambda m: {"arrays": m.heads.state_dict()},
        lambda m, r: m.heads.load_state_dict(r["arrays"]),
    ),
    "trained": Part(Backbone, _trained, lambda m, r: m.load_state_dict(r["arrays"], strict=False)),
    "adapter": Part(Adapted, _adapter, _load_adapter),
    "two_models": Part(
        encoder_and_classifier,
        lambda m: {"encoder": m[0].state_dict(), "classifier": m[1].state_dict()},
        _load_both,
    ),
    "two_parts": Part(
        Backbone,
        lambda m: {"encoder": m.body.state_dict(), "classifier": m.heads.state_dict()},
        lambda m, r: _load_both([m.body, m.heads], r),
    ),
    "whole": Part(
        Backbone,
        lambda m: {"arrays": m.state_dict()},
        lambda m, r: m.load_state_dict(r["arrays"]),
    ),
}


def part_apps(
    part: Part,
    *,
    plugin: bool = True,
    rounds: int = 2,
    clients: int = 2,
    client_factory: Callable[[], Any] | None = None,
    client_plugin: bool | None = None,
    client_factorised: bool = True,
    evaluates: bool = False,
    reads_first: bool = False,
    mods: Sequence[Any] = (),
    inputs: int = 32,
    rate: float = 0.1,
) -> Apps:
    """Return an app that exchanges a part of its model.

    The final state lies in the outcome's ``state``, under ``record/name`` if there are several.

    Args:
        part: what it exchanges.
        plugin: whether both sides have the README's lines.
        rounds: of the run.
        clients: how many there are.
        client_factory: builds the clients' model, if it is another.
        client_plugin: whether the clients have their lines, if the server differs.
        client_factorised: whether the clients' factory is wrapped, if they have the mod.
        reads_first: whether clients read the message before they build their model.
        evaluates: whether clients evaluate what was aggregated, which tells the plugin of it.
        mods: of the clients, before the plugin's.
        inputs: of the first model.
        rate: of training.
    """
    on_client = plugin if client_plugin is None else client_plugin
    # A function is wrapped; a class of this file would be changed for other tests too.
    build = _wrapped(part.factory, wraps=plugin)
    client_build = _wrapped(client_factory or part.factory, wraps=on_client and client_factorised)

    def client() -> ClientApp:
        app = ClientApp(mods=[*mods, fedpara.client_mod] if on_client else [])

        @app.train()
        def train(message: Message, context: Context) -> Message:
            content: Any = message.content
            built = None if reads_first else client_build()
            records = content.array_records
            received = {k: r.to_torch_state_dict() for k, r in records.items()}
            built = client_build() if built is None else built
            part.load(built, received)
            _train(
                built, seed=int(str(context.node_config["partition-id"])), inputs=inputs, rate=rate
            )
            found = {name: ArrayRecord(state) for name, state in part.records(built).items()}
            reply = RecordDict({**found, "metrics": MetricRecord({"num-examples": 8})})
            return Message(reply, reply_to=message)

        @app.evaluate()
        def evaluate(message: Message, context: Context) -> Message:
            metrics = MetricRecord({"num-examples": 8})
            return Message(RecordDict({"metrics": metrics}), reply_to=message)

        return app

    def server(outcome: Outcome) -> ServerApp:
        app = fedpara.server_app(ServerApp()) if plugin else ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            built = build()
            first = {name: ArrayRecord(state) for name, state in part.records(built).items()}
            if len(first) == 1:
                strategy = FedAvg(fraction_evaluate=float(evaluates))
                result = strategy.start(
                    grid=grid, initial_arrays=first["arrays"], num_rounds=rounds
                )
                outcome.state = dict(result.arrays.to_torch_state_dict())
                return
            for number in range(1, rounds + 1):
                first = _averaged(grid, first, number)
            outcome.state = {
                f"{record}/{name}": value
                for record, arrays in first.items()
                for name, value in arrays.to_torch_state_dict().items()
            }

        return app

    return Apps(client, server, clients)


def _wrapped(factory: Callable[[], Any], *, wraps: bool) -> Callable[[], Any]:
    return fedpara.factorised(lambda: factory()) if wraps else factory


def _train(built: Any, *, seed: int, inputs: int, rate: float) -> None:
    models = built if isinstance(built, tuple) else (built,)
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, rate)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(3):
        out = torch.randn(8, inputs, generator=draw)
        for model in models:
            out = model(out)
        optimizer.zero_grad()
        (out - 1).square().mean().backward()
        optimizer.step()


def _averaged(
    grid: Grid, records: Mapping[str, ArrayRecord], number: int
) -> dict[str, ArrayRecord]:
    content = RecordDict({**records, "config": ConfigRecord({"server-round": number})})
    messages = [
        Message(content, dst_node_id=node, message_type="train", group_id=str(number))
        for node in grid.get_node_ids()
    ]
    replies = [r.content for r in grid.send_and_receive(messages) if not r.has_error()]
    found = {}
    for name in records:
        states = [content[name].to_torch_state_dict() for content in replies]
        found[name] = ArrayRecord(
            {key: torch.stack([s[key] for s in states]).mean(0) for key in states[0]}
        )
    return found
