"""A FedML project whose processes fail on demand, and note what they hold.

``FEDPARA_TROUBLE`` says who fails, when and how, such as ``client 2 round 1 raises``; several are
joined by ``;``. ``FEDPARA_NOTES`` is a folder for states before and after each training;
clients' messages go to ``messages`` beside it.
``FEDPARA_PLUGIN=off`` takes FedML's own runner. ``FEDPARA_LEAK=1`` sends private factors too.
``FEDPARA_RECORD`` is a folder for all that goes to torch's RPC.
``FEDPARA_ASSESS=1`` gives the aggregator an assessment of its own.
``FEDPARA_HOSTILE`` is a rank and names of attacks, one a round (JSON), by that process.
"""

import itertools
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fedml
import torch
from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "compat_tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "fedml_cross_silo"))

import digits
from net import Net

STEP = 5
"""At which of a round's steps a client dies, if it does in one."""

NOTES = os.environ.get("FEDPARA_NOTES", "")


def trouble(who: str, number: int) -> str:
    """Return what goes wrong for a party in a round (from 1 on); "" if nothing does."""
    for part in os.environ.get("FEDPARA_TROUBLE", "").split(";"):
        words = part.split()
        if words and words[:-1] == [*who.split(), "round", str(number)]:
            return words[-1]
    return ""


def die() -> None:
    """Die at once, as if the power failed."""
    os.kill(os.getpid(), signal.SIGKILL)


class Trainer(ModelTrainerCLS):  # type: ignore[misc]
    """FedML's default, with trouble."""

    last: nn.Module
    trouble = ""
    trained = 0

    def train(self, train_data: Any, device: Any, args: Any, **more: Any) -> None:
        """Train as the default does, unless something goes wrong."""
        number, rank = args.round_idx + 1, args.rank
        Trainer.last = self.model
        self.note(number, "before")
        what = Trainer.trouble = trouble(f"client {rank}", number)
        if what == "raises":
            raise RuntimeError("the disk is full")
        if what == "dies":
            die()
        if what == "dies-in-step":  # some weights have changed, private ones among them
            steps = itertools.count()
            self.model.register_forward_hook(lambda *_: die() if next(steps) == STEP else None)
        super().train(train_data, device, args, **more)
        if what == "dies-late":  # all has changed, and nothing is sent or kept
            die()
        if what == "nan":
            with torch.no_grad():
                next(iter(self.model.parameters())).fill_(torch.nan)
        self.note(number, "after")
        self.trained = number

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        """Test as the default does, and note what is tested on clients."""
        number = args.round_idx + 1
        if getattr(args, "test_on_clients", None):
            self.note(number, "tested-after" if self.trained == number else "tested-before")
        return super().test(test_data, device, args)

    def note(self, number: int, when: str) -> None:
        """Write the model's state."""
        if NOTES:
            torch.save(self.model.state_dict(), Path(NOTES) / f"{self.id}-{number}-{when}.pt")


class Aggregator(DefaultServerAggregator):  # type: ignore[misc]
    """FedML's default, with trouble."""

    def aggregate(self, models: Any) -> Any:
        """Aggregate as the default does, unless something goes wrong."""
        what = trouble("server", self.args.round_idx + 1)
        if what == "dies":
            die()
        if what == "raises":
            raise RuntimeError("no such column")
        return super().aggregate(models)


def die_writing() -> None:
    """Let a client die, in some rounds, when everything is written and not yet valid."""
    from fedpara_plugins.support import FileStorage

    write = FileStorage._write

    def written(self: Any, changes: Any) -> None:
        if Trainer.trouble == "dies-writing":
            self._database.set_trace_callback(lambda words: die() if words == "COMMIT" else None)
        write(self, changes)

    FileStorage._write = written  # type: ignore[method-assign]


def send_garbage() -> None:
    """Send, in some rounds, a reply that is no message, or a damaged one, or none."""
    from fedpara_plugins_fedml.engine.client import ClientEngine

    train = ClientEngine.train

    def damaged(self: Any, *args: Any, **options: Any) -> bytes:
        reply = train(self, *args, **options)
        what = trouble(f"client {self._args.rank}", self._args.round_idx + 1)
        if what == "dies-written":  # all is kept, and nothing is sent
            die()
        if what == "garbage":
            return b"garbage" * 1000
        return reply[: len(reply) // 2] if what == "cut" else reply

    ClientEngine.train = damaged  # type: ignore[method-assign]


def leak() -> None:
    """Send a message with the bare private factors before every reply."""
    from fedpara_plugins import split
    from fedpara_plugins_fedml.transport.peers import Endpoint
    from fedpara_plugins_fedml.transport.protocol import HEARTBEAT, REPLY

    send = Endpoint.send

    def leaking(self: Any, peer: int, kind: int, data: Any = None, **fields: Any) -> None:
        if kind == REPLY:
            private = split(Trainer.last).private.values()
            send(self, peer, HEARTBEAT, b"".join(v.detach().numpy().tobytes() for v in private))
        send(self, peer, kind, data, **fields)

    Endpoint.send = leaking  # type: ignore[method-assign]


def record() -> None:
    """Note all that this process hands to torch's RPC: calls, answers, and tensors if any."""
    from torch.distributed.rpc.internal import _InternalRPCPickler

    serialize, lock = _InternalRPCPickler.serialize, threading.Lock()
    path = Path(os.environ["FEDPARA_RECORD"]) / str(os.getpid())

    def recording(self: Any, value: Any) -> tuple[bytes, list[torch.Tensor]]:
        data, tensors = serialize(self, value)
        with lock, path.open("ab") as file:
            file.write(data)
            file.writelines(each.detach().cpu().contiguous().numpy().tobytes() for each in tensors)
        return data, tensors

    _InternalRPCPickler.serialize = recording  # type: ignore[method-assign]


def note_messages() -> None:
    """Note, on clients, what comes to the engine and what leaves it and the process."""
    from fedpara_plugins_fedml.engine.client import ClientEngine
    from fedpara_plugins_fedml.transport.peers import Endpoint

    train, send = ClientEngine.train, Endpoint.send

    def write(direction: str, kind: str, data: bytes) -> None:
        (Path(NOTES).parent / "messages" / f"{time.time_ns()}.{direction}.{kind}").write_bytes(data)

    def noted(self: Any, client: str, data: bytes, *args: Any, **options: Any) -> bytes:
        write("down", "message", data)
        reply = train(self, client, data, *args, **options)
        write("up", "message", reply)
        return reply

    def noted_send(self: Any, peer: int, kind: int, data: Any = None, **fields: Any) -> None:
        if self.own != 0:
            write("up", "bytes", bytes(data or b"") + repr(fields).encode())
        send(self, peer, kind, data, **fields)

    ClientEngine.train = noted  # type: ignore[method-assign]
    Endpoint.send = noted_send  # type: ignore[method-assign]


def be_late() -> None:
    """Delay FedML's own server before it is ready, in round 1 or never."""
    from fedml.cross_silo.server.fedml_server_manager import FedMLServerManager

    ready = FedMLServerManager.handle_message_connection_ready

    def late(self: Any, message: Any) -> None:
        if trouble("server", 1) == "is-late":
            time.sleep(4)
        ready(self, message)

    FedMLServerManager.handle_message_connection_ready = late


def main() -> None:
    """Run one process."""
    if os.environ.get("FEDPARA_RECORD"):
        record()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    args = fedml.init(check_env=False, should_init_logs=False)
    if os.environ.get("FEDPARA_PLUGIN") == "off":
        be_late()
        runner = fedml.FedMLRunner
    else:
        from fedpara_plugins_fedml import FedMLRunner as runner  # noqa: N813

        if NOTES:
            note_messages()
        send_garbage()
        die_writing()
        if os.environ.get("FEDPARA_LEAK"):
            leak()
        if os.environ.get("FEDPARA_HOSTILE"):
            from harness.fedml.hostile_process import be_hostile

            be_hostile(*json.loads(os.environ["FEDPARA_HOSTILE"]))
    dataset = digits.load(args.client_num_in_total, args.batch_size)
    model: nn.Module = Net()
    device = torch.device("cpu")
    runner(args, device, dataset, model, Trainer(model, args), Aggregator(model, args)).run()


if __name__ == "__main__":
    main()
