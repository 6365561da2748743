"""A server that sends a client whatever it likes, and searches what comes back for private values.

The client's app plants recognisable values in its model before it answers: under the names that are
private by the client's own options, and others under the shared ones, for the control.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec, reference_hash
from harness.flower.inprocess_grid import InProcessGrid

__all__ = [
    "Described",
    "Device",
    "Net",
    "Reply",
    "described",
    "planted",
    "private_names",
    "value_of",
]

PAYLOAD = "fedpara.payload"

State = dict[str, Tensor]
Factory = Callable[[], nn.Module]
Content = Mapping[str, Any]


class Net(nn.Module):
    """Two layers that are factorised, of which the second is the head, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(24, 40)
        self.norm = nn.LayerNorm(40)
        self.head = nn.Linear(40, 30)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(torch.relu(self.norm(self.body(x))))
        return logits


# What is planted ----------------------------------------------------------------------------------


def value_of(name: str, shape: Sequence[int]) -> Tensor:
    """Return the values that a client has under a name after its training."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(state: Mapping[str, Tensor]) -> State:
    """Return the state after the training: recognisable values, in floats of any shape."""
    return {
        name: value_of(name, value.shape) if value.is_floating_point() else value
        for name, value in state.items()
    }


def private_names(names: Sequence[str], *, method: str, patterns: Sequence[str] = ()) -> set[str]:
    """Return the names that stay on a device, by the paper and the option ``private`` alone.

    Args:
        names: of the client's own model.
        method: that its model was converted with.
        patterns: of the option.
    """
    second = {"x2", "y2", "t2"} if method == "pfedpara" else set()
    return {
        name
        for name in names
        if name.rpartition(".")[2].rpartition("_")[2] in second
        or any(fnmatchcase(name, pattern) for pattern in patterns)
    }


# The device ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What came back.

    Attributes:
        data: every byte that left the device.
        error: the text of an error, or "".
        content: the records.
        ran: whether the user's code was called.
        tensors: what the server decodes, by record.
    """

    data: bytes
    error: str
    content: RecordDict
    ran: bool
    tensors: Mapping[str, State]


@dataclass
class Device:
    """One client.

    Args:
        net: the model's factory as the app's code calls it (`factorised` or not).
        mods: of the ClientApp.
        run_config: of the run.
        node_config: of the node.
        answer: makes the state of an answer from the model, after the values were planted.
        legacy: whether the app has the legacy API.
        cached: whether the app builds its model once and uses it in later rounds.
        loads: whether the app loads what came into its model.
    """

    net: Factory
    mods: Sequence[Any]
    run_config: Content = field(default_factory=dict)
    node_config: Content = field(default_factory=dict)
    answer: Callable[[nn.Module, Message | None], Any] | None = None
    legacy: bool = False
    cached: bool = False
    loads: bool = True

    def __post_init__(self) -> None:
        self._runs = 0
        self._model: nn.Module | None = None
        self.held: dict[str, State] = {}
        self.grid = InProcessGrid(
            self._app,
            nodes=1,
            run_config=dict(self.run_config),
            node_config=dict(self.node_config),
        )

    def send(
        self, content: Content | Error, kind: str = "train", run_config: Content | None = None
    ) -> Reply:
        """Send a message and return what comes back.

        Args:
            content: records by name, of which those that `described` made are remembered as
                references; or an error.
            kind: the message's type.
            run_config: replaces the run's config from now on.
        """
        if run_config is not None:
            self.grid.run_config = dict(run_config)
        plain = content if isinstance(content, Error) else self._records(content)
        before, first = self._runs, len(self.grid.sent)
        reply = self.grid.ask(0, plain, kind)
        data = b"".join(sent.data for sent in self.grid.sent[first:] if sent.direction == "up")
        return Reply(
            data=data,
            error=reply.error.reason if reply.has_error() else "",
            content=reply.content if reply.has_content() else RecordDict(),
            ran=self._runs > before,
            tensors=self._decoded(reply) if reply.has_content() else {},
        )

    def _records(self, content: Content) -> RecordDict:
        for record in content.values():
            if isinstance(record, Described):
                self.held[reference_hash(record.tensors)] = record.tensors
        return RecordDict(
            {k: r.record if isinstance(r, Described) else r for k, r in content.items()}
        )

    def _decoded(self, reply: Message) -> dict[str, State]:
        found: dict[str, State] = {}
        for name, record in reply.content.array_records.items():
            read = {key: _read(array) for key, array in record.items()}
            tensors = {key: value for key, value in read.items() if value is not None}
            if list(tensors) == [PAYLOAD]:
                payload = tensors[PAYLOAD].numpy().tobytes()
                tensors = decode_payload(payload, references=self.held, limit=10**8).tensors
            found[name] = tensors
        return found

    # The user's code

    def _built(self) -> nn.Module:
        if not self.cached:
            return self.net()
        if self._model is None:
            self._model = self.net()
        return self._model

    def _state(self, model: nn.Module, message: Message | None) -> Any:
        if self.answer is not None:
            return self.answer(model, message)
        return planted(model.state_dict())

    def _app(self) -> ClientApp:
        return self._legacy_app() if self.legacy else self._message_app()

    def _message_app(self) -> ClientApp:
        app = ClientApp(mods=list(self.mods))

        def respond(message: Message, context: Context) -> Message:
            self._runs += 1
            model = self._built()
            records = dict(message.content.array_records)
            if self.loads and records:
                given = next(iter(records.values())).to_torch_state_dict()
                model.load_state_dict(given, strict=False)
            state = self._state(model, message)
            arrays = {name: ArrayRecord(state) for name in records or ["arrays"]}
            metrics = {"num-examples": 1, "eval_loss": 0.0}
            return Message(
                RecordDict({**arrays, "metrics": MetricRecord(metrics)}), reply_to=message
            )

        for register in (app.train, app.evaluate, app.query):
            register()(respond)
            register("special")(respond)
        return app

    def _legacy_app(self) -> ClientApp:
        device = self

        class Client(NumPyClient):
            def __init__(self) -> None:
                self.model = device._built()

            def get_parameters(self, config: Any) -> Any:
                device._runs += 1
                return _arrays(device._state(self.model, None))

            def fit(self, parameters: Any, config: Any) -> Any:
                device._runs += 1
                if device.loads:
                    self._load(parameters)
                return _arrays(device._state(self.model, None)), 1, {}

            def evaluate(self, parameters: Any, config: Any) -> Any:
                device._runs += 1
                return 0.0, 1, {}

            def _load(self, parameters: Any) -> None:
                pairs = zip(self.model.state_dict(), parameters, strict=True)
                self.model.load_state_dict({k: torch.as_tensor(v) for k, v in pairs})

        return ClientApp(client_fn=lambda context: Client().to_client(), mods=list(self.mods))


def _read(array: Array) -> Tensor | None:
    """Return an array as a tensor; None for a refusal, which is no array."""
    try:
        return torch.from_numpy(np.array(array.numpy()))
    except (TypeError, ValueError):
        return None


def _arrays(state: Mapping[str, Tensor]) -> list[Any]:
    return [value.numpy() for value in state.values()]


# What the server sends ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Described:
    """A record with a payload.

    Attributes:
        record: as it is sent.
        tensors: in it.
        model: their description.
    """

    record: ArrayRecord
    tensors: State
    model: Mapping[str, Any] | None


def described(
    model: Mapping[str, Any] | None,
    tensors: Mapping[str, Tensor],
    *,
    extra: Mapping[str, Any] | None = None,
    codec: str = "none",
) -> Described:
    """Return a record with a payload.

    Args:
        model: the description in the header, which may be anything.
        tensors: in the payload.
        extra: further fields of the header.
        codec: of the payload, without a reference.
    """
    payload = encode_payload(
        tensors, codec=parse_codec(codec).first_contact(), model=model, extra=extra
    )
    array = Array(np.frombuffer(payload, dtype=np.uint8))
    return Described(ArrayRecord({PAYLOAD: array}), dict(tensors), model)
