"""A hostile client process: what it sends over a real transport in the place of its replies.

It changes FedML's messages as they leave the process, after all that the plugin does to them; and
it uses the transport itself for what is no message of FedML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from fedml.core.distributed.communication.message import Message
from torch import Tensor

from fedpara_plugins_fedml.seams import MODEL_KEY
from fedpara_plugins_fedml.transport.peers import Endpoint
from fedpara_plugins_fedml.transport.protocol import BYE, CLOSE, FINISH, HELLO, REPLY, TASK
from harness.fedml.hostile import ENVELOPES, Attack, tensors

__all__ = ["ATTACKS", "be_hostile", "lines_of"]

ProcessAttack = Callable[[Endpoint, Message], Iterator[Message]]
"""Maps a reply to the messages that are sent in its place."""


def _private(state: dict[str, Tensor]) -> dict[str, Tensor]:
    like = next(key for key in state if key.endswith(".x1"))
    return {**state, like.replace(".x1", ".x2"): state[like]}


def envelope(name: str) -> tuple[ProcessAttack, str]:
    """Send another envelope in a reply, as `ENVELOPES` has it."""
    attack, words = ENVELOPES[name]
    return instead(attack), words


def instead(attack: Attack) -> ProcessAttack:
    """Send another envelope in a reply."""

    def sent(endpoint: Endpoint, reply: Message) -> Iterator[Message]:
        yield _with(reply, model_params=attack(reply.get(MODEL_KEY)))

    return sent


def fields(**values: Any) -> ProcessAttack:
    """Give a reply's message other fields; None takes one out."""

    def sent(endpoint: Endpoint, reply: Message) -> Iterator[Message]:
        yield _with(reply, **values)

    return sent


def _with(reply: Message, **values: Any) -> Message:
    for name, value in values.items():
        if value is None:
            reply.get_params().pop(name)
        else:
            reply.add_params(name, value)
    return reply


def sender_of_text(endpoint: Endpoint, reply: Message) -> Iterator[Message]:
    """Name the sender as text, and send damage."""
    reply.sender_id = str(reply.sender_id)
    yield _with(reply, sender=reply.sender_id, model_params=b"FPE1")


def garbage(endpoint: Endpoint, reply: Message) -> Iterator[Message]:
    """Send what is no message of FedML, past FedML's own sending, and then damage."""
    manager = endpoint.com_manager
    if endpoint.backend == "MPI":
        manager.comm.send("garbage", dest=0)
        manager.comm.send(None, dest=0)
    elif endpoint.backend == "TRPC":
        from fedml.core.distributed.communication.trpc.trpc_server import TRPCCOMMServicer
        from torch.distributed import rpc

        rpc.rpc_sync("worker0", TRPCCOMMServicer.sendMessage, args=(endpoint.own, "garbage"))
    elif endpoint.backend == "GRPC":
        import grpc
        from fedml.core.distributed.communication.grpc import grpc_comm_manager_pb2 as messages
        from fedml.core.distributed.communication.grpc import grpc_comm_manager_pb2_grpc as stubs

        server = manager.grpc_mappings[0]
        address = f"{server.grpc_server_ip}:{server.grpc_server_port}"
        with grpc.insecure_channel(address) as channel:
            stub = stubs.gRPCCommManagerStub(channel)
            for data in (b"garbage", b"", b"\x80\x04]."):
                stub.sendMessage(messages.CommRequest(client_id=endpoint.own, message=data))
    else:
        topic = f"{manager.topic}{endpoint.own}"
        lost = {"msg_type": REPLY, "sender": endpoint.own, "receiver": 0, "model_params": "none"}
        for text in ("garbage", "[]", "{}", json.dumps(lost)):
            manager.mqtt_mgr.send_message(topic, text)
        return  # the last one is said of its sender
    yield _with(reply, model_params=b"FPE1")


ATTACKS: Mapping[str, tuple[ProcessAttack | None, str]] = {
    **{
        name: envelope(name)
        for name in (
            "float8",
            "NaN",
            "complex NaN",
            "NaN examples",
            "huge examples",
            "half a message",
            "a flipped bit",
            "a nested head",
            "a payload of 8 TB",
            "100 MB of zeros",
            "a missing tensor",
            "another round",
            "another purpose",
            "an error of configuration",
            "lost, for ever",
            "no bytes",
        )
    },
    "a private tensor": (instead(tensors(_private)), "private names stay on the client"),
    # FedML itself, over MQTT, takes the length of all that it reads.
    "a number": (instead(ENVELOPES["a number"][0]), "got a int|not read by FedML"),
    "a training that raises": (None, "the disk is full"),
    "no model": (fields(model_params=None), "NoneType"),
    "FedML's own reply": (fields(msg_type=3), "FedML's own message 3"),
    "a message of the server": (fields(msg_type=TASK), "a task"),
    "the end of the run": (fields(msg_type=FINISH), "a finish"),
    "another message of the server": (fields(msg_type=CLOSE), "a close"),
    "an unknown type": (fields(msg_type=12345), "no known type"),
    "a type that is a list": (fields(msg_type=[REPLY]), "no known type"),
    "a type of the plugin that never travels": (fields(msg_type=HELLO), "no known type"),
    "an event without a message": (fields(msg_type=-1), "no known type"),
    "the silo of another client": (fields(silo=0), "names the silo 0"),
    "a silo that nobody has": (fields(silo=77), "names the silo 77"),
    "a silo of text": (fields(silo="1"), "names the silo -1"),
    "no silo": (fields(silo=None), "names the silo -1"),
    "a sender of text": (sender_of_text, "a message of 4 bytes is incomplete"),
    "no message of FedML": (garbage, "4 bytes is incomplete|not read by FedML"),
    "a word that it leaves": (fields(msg_type=BYE), "has left the run"),
}
"""What the client sends, and what the server's line says; None stands for an honest client whose
training fails. The last one is for the last round: the client is out afterwards."""


def be_hostile(rank: int, plan: list[str]) -> None:
    """Let this process, if it has a rank, send an attack in each round.

    Args:
        rank: of the hostile process.
        plan: names of attacks, one a round.
    """
    send = Endpoint.send_message

    def hostile(self: Endpoint, message: Message) -> None:
        attack = None
        if self.own == rank and message.get_type() == REPLY:
            attack, _ = ATTACKS[plan[self.args.round_idx]]
        for each in [message] if attack is None else attack(self, message):
            send(self, each)

    Endpoint.send_message = hostile


def lines_of(log: str, silo: int, number: int) -> list[str]:
    """Return the lines that say that a silo is left out of a round."""
    found = re.findall(rf"left out client {silo} in round {number}: .*", log)
    return [str(line) for line in found]
