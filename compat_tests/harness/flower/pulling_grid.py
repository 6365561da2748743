"""The Grid of a deployment, with a SuperLink in this process that any SuperNode may feed.

Messages and clients are those of `InProcessGrid`. Replies are pulled as Flower's own Grid does it,
object by object, and a test may change these objects, as a changed SuperNode can.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from flwr.app import Message

from harness.flower.inprocess_grid import RUN_ID, InProcessGrid

Real: Any
try:  # as in flwr 1.42
    from flwr.superlink.grid.http_grid import HttpGrid as Real
except ImportError:  # as in flwr 1.22
    from flwr.server.grid.grpc_grid import GrpcGrid as Real

__all__ = ["MODULE", "Objects", "PullingGrid"]

MODULE: Any = sys.modules[Real.__module__]
"""The module in which Flower has that Grid."""

Objects = dict[str, bytes]
"""The objects of one reply, as the SuperLink has them: content by id, the message first."""


class PullingGrid(Real):  # type: ignore[misc]
    """Pulls the replies of another Grid's clients as Flower's Grid of a deployment does.

    Args:
        inner: has the clients.
        spoil: changes the objects of a reply; gets the honest message too.
    """

    def __init__(self, inner: InProcessGrid, spoil: Callable[[Message, Objects], None]) -> None:
        self.node = MODULE.Node(node_id=1)
        self._run = SimpleNamespace(run_id=RUN_ID)
        self._inner = inner
        self._spoil = spoil
        self._objects: Objects = {}
        self._proxy = SimpleNamespace(
            PullMessages=self._pull_messages,
            PullObject=self._pull_object,
            ConfirmMessageReceived=lambda request: None,
        )

    @property
    def _runtime_client(self) -> Any:
        return self._proxy

    @property
    def _stub(self) -> Any:
        return self._proxy

    def get_node_ids(self) -> Iterable[int]:
        return self._inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._inner.push_messages(messages)

    def _pull_messages(self, request: Any) -> Any:
        protos, trees = [], []
        for reply in self._inner.pull_messages(request.message_ids):
            vars(reply.metadata)["_message_id"] = reply.object_id
            parts = MODULE.get_all_nested_objects(reply)
            objects = {reply.object_id: b""} | {key: part.deflate() for key, part in parts.items()}
            protos.append(MODULE.message_to_proto(MODULE.remove_content_from_message(reply)))
            trees.append(MODULE.get_object_tree(reply))
            self._spoil(reply, objects)
            self._objects |= objects
        return MODULE.PullAppMessagesResponse(messages_list=protos, message_object_trees=trees)

    def _pull_object(self, request: Any) -> Any:
        content = self._objects.get(request.object_id)
        return SimpleNamespace(
            object_found=content is not None, object_available=True, object_content=content or b""
        )
