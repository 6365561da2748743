"""A Grid that runs the ClientApps in this process, without an engine, faithful to the wire.

Every message is taken apart into the objects that Flower sends (their very bytes) and rebuilt on
the other side, so no Python object is ever on both sides. The bytes pass the check of Flower's
SuperLink, and the name that stands in them is all that says what is rebuilt: a message with an
object of another class is as impossible as with an engine. Each node keeps its ``Context.state``
between messages, in the same form. A ClientApp is built anew for each message, as in Flower's
deployment, where every message has a process of its own. Exceptions become the Error replies that
the engine makes of them. HTTP's chunks are left out.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal
from uuid import uuid4

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp

from fedpara_plugins import FedParaError
from harness.oracles.descriptions import separated

try:  # as in flwr 1.41
    from flwr.clientapp.client_app import ClientAppException
except ImportError:  # as in flwr 1.22
    from flwr.client.client_app import ClientAppException  # type: ignore[import-not-found,no-redef]

try:  # as in flwr 1.42
    from flwr.supercore.inflatable import inflatable_utils
except ImportError:  # as in flwr 1.22
    from flwr.common import inflatable_utils  # type: ignore[attr-defined,no-redef]

TaskIdentity: Any
try:  # flwr 1.41 takes the sender of a new message from here
    from flwr.supercore.task_identity import TaskIdentity
except ImportError:  # flwr 1.22 has the Grid fill it in
    TaskIdentity = None

__all__ = ["Engine", "InProcessGrid", "Sent", "WireObject"]

Engine = Literal["simulation", "deployment"]
RunConfig = Mapping[str, bool | float | int | str]

RUN_ID = 1234567890123

PAYLOAD = "fedpara.payload"
JOINT = "fedpara_joint"
"""Name of the array that holds a payload."""


@dataclass(frozen=True)
class WireObject:
    """A message, record or array as it travels.

    Attributes:
        content: the bytes that Flower sends for it; the name of its class comes first.
        children: the objects it consists of, by their id; equal ones travel once.
    """

    content: bytes
    children: Mapping[str, WireObject]

    @classmethod
    def of(cls, value: Any) -> WireObject:
        """Take a Flower object apart, as a sender does, and check it, as a SuperLink does.

        Raises:
            UnexpectedObjectContentError: a SuperLink would refuse it, such as an object of a class
                that is not Flower's own.
        """
        children = {key: cls.of(child) for key, child in (value.children or {}).items()}
        content = bytes(value.deflate())
        inflatable_utils.validate_object_content(content)
        return cls(content, children)

    def rebuilt(self) -> Any:
        """Build a new Flower object that shares nothing with the one that was taken apart."""
        children = {key: child.rebuilt() for key, child in self.children.items()}
        name = inflatable_utils.get_object_head_values_from_object_content(self.content)[0]
        kind = inflatable_utils.inflatable_class_registry[name]
        return kind.inflate(self.content, children or None)

    def contents(self) -> Iterator[bytes]:
        """Yield the bytes of this object and of all its parts."""
        yield self.content
        for child in self.children.values():
            yield from child.contents()


@dataclass(frozen=True)
class Sent:
    """One message on its way, as the wire sees it.

    Attributes:
        direction: ``down`` to a client, ``up`` from one.
        node: the client's id.
        partition: the client's number, from 0.
        kind: the message's type, ``train`` or ``evaluate``.
        round: that the strategy wrote into the message, or into the one that this answers.
        wire: the bytes.
    """

    direction: Literal["down", "up"]
    node: int
    partition: int
    kind: str
    round: int
    wire: WireObject

    @property
    def message(self) -> Message:
        """Rebuild the message; a change of it changes nothing else."""
        message: Message = self.wire.rebuilt()
        return message

    @property
    def content(self) -> RecordDict:
        """Return its records; empty for an error."""
        message = self.message
        return message.content if message.has_content() else RecordDict()

    @property
    def arrays(self) -> dict[str, ArrayRecord]:
        """Return its records of arrays by name, those apart that travelled as one."""
        found = dict(self.content.array_records)
        if JOINT not in found:
            return found
        with contextlib.suppress(FedParaError):  # a damaged one
            records = separated({JOINT: found[JOINT][PAYLOAD].numpy().tobytes()})
            del found[JOINT]
            for name, payload in records.items():
                found[name] = ArrayRecord({PAYLOAD: Array(np.frombuffer(payload, dtype=np.uint8))})
        return found

    @property
    def payloads(self) -> dict[str, bytes]:
        """Return the plugin's payloads by record."""
        found = {}
        for name, record in self.arrays.items():
            if list(record) == [PAYLOAD]:
                with contextlib.suppress(TypeError, ValueError):  # a refusal, which is no array
                    array = record[PAYLOAD].numpy()
                    if isinstance(array, np.ndarray):  # and no archive, which a hostile one may be
                        found[name] = array.tobytes()
        return found

    @property
    def data(self) -> bytes:
        """Return everything that travels for this message, end to end."""
        return b"".join(self.wire.contents())

    @property
    def array_bytes(self) -> int:
        """Count the bytes of all arrays as Flower serialises each, without names and framing."""
        records = self.content.array_records.values()
        return sum(len(array.data) for record in records for array in record.values())


class _Node:
    def __init__(self, partition: int, partitions: int, seed: int) -> None:
        self.id = random.Random(f"{seed}:{partition}").getrandbits(62)
        self.partition = partition
        self.config: dict[str, Any] = {"partition-id": partition, "num-partitions": partitions}
        self.state = WireObject.of(RecordDict())


class InProcessGrid(Grid):
    """Runs clients one after the other when their replies are asked for.

    Replies come in the order of the nodes' ids, so that sums, and with them whole runs, are the
    same bit for bit each time; no engine promises an order.

    Args:
        client_app: builds the ClientApp, once a message.
        nodes: how many clients there are.
        run_config: what their ``Context.run_config`` holds.
        engine: whose behaviour for exceptions: ``simulation`` wraps them and forgets what the
            client changed in its state; ``deployment`` does neither.
        tap: called with each message, in both directions, as it travels, and with this Grid. All
            messages are kept in ``sent`` anyway.
        late: a reply for which it is true does not come in time: the client has done its work, and
            the server never hears of it.
        node_config: entries of every node's config besides its number.

    Attributes:
        run_config: what their ``Context.run_config`` holds from the next message on.
        sent: all messages so far.
    """

    def __init__(
        self,
        client_app: Callable[[], ClientApp],
        *,
        nodes: int = 4,
        run_config: RunConfig | None = None,
        engine: Engine = "simulation",
        tap: Callable[[Sent, InProcessGrid], None] | None = None,
        late: Callable[[Sent], bool] | None = None,
        node_config: RunConfig | None = None,
    ) -> None:
        self._late = late
        self._client_app = client_app
        made = sorted((_Node(i, nodes, RUN_ID) for i in range(nodes)), key=lambda node: node.id)
        for node in made:
            node.config |= node_config or {}
        self._nodes = {node.id: node for node in made}
        self.run_config = dict(run_config or {})
        self._engine = engine
        self._tap = tap
        self._waiting: dict[str, WireObject] = {}
        self._lock = threading.RLock()
        self.sent: list[Sent] = []

    # For tests

    def node_id(self, partition: int) -> int:
        """Return the id of a client, given its number."""
        return next(node.id for node in self._nodes.values() if node.partition == partition)

    def client_state(self, partition: int) -> RecordDict:
        """Return a copy of what a client keeps."""
        state: RecordDict = self._nodes[self.node_id(partition)].state.rebuilt()
        return state

    def lose_state(self, partition: int) -> None:
        """Let a client forget everything, as after a restart of its SuperNode."""
        self._nodes[self.node_id(partition)].state = WireObject.of(RecordDict())

    def serve(
        self, app: ServerApp, run_config: RunConfig | None = None, grid: Grid | None = None
    ) -> None:
        """Run a ServerApp to its end, as the engine does, with this Grid or one around it."""
        context = Context(
            run_id=RUN_ID,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(run_config or {}),
        )
        with _identity(SUPERLINK_NODE_ID):
            app(grid=grid or self, context=context)

    def replace_app(self, client_app: Callable[[], ClientApp]) -> None:
        """Run another ClientApp from the next message on; nodes keep their state."""
        self._client_app = client_app

    def ask(self, partition: int, content: RecordDict | Error, kind: str) -> Message:
        """Send one client a message of any content, and return its reply.

        Args:
            partition: the client's number.
            content: records, or an error: then the message has no content.
            kind: the message's type.
        """
        with _identity(SUPERLINK_NODE_ID):
            records = content if isinstance(content, RecordDict) else RecordDict()
            message = Message(records, self.node_id(partition), kind)
            if isinstance(content, Error):
                # No constructor makes such a message to a client; the wire can carry it.
                message.__dict__.update(_content=None, _error=content)
            (reply,) = self.send_and_receive([message])
        return reply

    # Flower's interface

    def set_run(self, run: Any) -> None:
        """Ignore the run: there is only one."""

    @property
    def run(self) -> Any:
        """Return the run, as far as apps ask for it."""
        return SimpleNamespace(run_id=RUN_ID)

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes, which are always connected."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Put messages on the wire."""
        ids = []
        for message in messages:
            # Flower's own grids write these into __dict__ too: there is no public way.
            fields = message.metadata.__dict__
            fields.update(_run_id=RUN_ID, _src_node_id=SUPERLINK_NODE_ID, _message_id=str(uuid4()))
            self._waiting[message.metadata.message_id] = self._sent(message, "down")
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Run the clients that these messages went to, and take their replies from the wire."""
        messages: list[Message] = []
        for message_id in message_ids:
            if message_id in self._waiting:
                messages.append(self._waiting.pop(message_id).rebuilt())
                # It is not among the bytes; each engine carries it beside them.
                messages[-1].metadata.__dict__["_message_id"] = message_id
        messages.sort(key=lambda message: message.metadata.dst_node_id)
        replies = []
        for message in messages:
            asked = _round_of(message)
            reply = self._answer(message)
            reply.metadata.__dict__["_message_id"] = str(uuid4())
            wire = self._sent(reply, "up", asked)
            if self._late is not None and self._late(self.sent[-1]):
                self.sent.pop()
            else:
                replies.append(wire.rebuilt())
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, then pull; one caller at a time, since the legacy API asks in several threads."""
        with self._lock:
            return self.pull_messages(list(self.push_messages(messages)))

    # Clients

    def _answer(self, message: Message) -> Message:
        node = self._nodes[message.metadata.dst_node_id]
        context = Context(
            run_id=RUN_ID,
            node_id=node.id,
            node_config=dict(node.config),
            state=node.state.rebuilt(),
            run_config=dict(self.run_config),
        )
        try:
            with _identity(node.id):
                reply = self._client_app()(message, context)
        except Exception as error:
            if self._engine == "deployment":
                node.state = WireObject.of(context.state)
            return Message(self._error(error), reply_to=message)
        node.state = WireObject.of(context.state)
        return reply

    def _error(self, error: Exception) -> Error:
        if self._engine == "simulation":
            error = ClientAppException(str(error))
        reason = str(type(error)) + ":<'" + str(error) + "'>"
        return Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=reason)

    def _sent(
        self, message: Message, direction: Any, server_round: int | None = None
    ) -> WireObject:
        metadata = message.metadata
        node = self._nodes[metadata.dst_node_id if direction == "down" else metadata.src_node_id]
        wire = WireObject.of(message)
        sent = Sent(
            direction=direction,
            node=node.id,
            partition=node.partition,
            kind=metadata.message_type,
            round=_round_of(message) if server_round is None else server_round,
            wire=wire,
        )
        self.sent.append(sent)
        if self._tap is not None:
            self._tap(sent, self)
        return wire


def _round_of(message: Message) -> int:
    if not message.has_content():
        return 0
    for record in message.content.config_records.values():
        if "server-round" in record:
            return int(str(record["server-round"]))
    return 0


@contextlib.contextmanager
def _identity(node_id: int) -> Iterator[None]:
    """Act as a node while its app runs, as its process would."""
    if TaskIdentity is None:
        yield
        return
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, node_id
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before
