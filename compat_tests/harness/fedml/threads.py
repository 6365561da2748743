"""A FedML run of several parties in one process: threads, with queues in a transport's place.

They run the same code as processes, down to FedML's `FedMLCommManager`. Messages are pickled on
their way, as by FedML's transports. A party can be cut off, or send something else than it should.
"""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from fedml.core.distributed.communication.constants import CommunicationConstants
from fedml.core.distributed.communication.message import Message
from fedml.core.distributed.fedml_comm_manager import FedMLCommManager

from fedpara_plugins_fedml.modes import distributed
from fedpara_plugins_fedml.settings import FedMLSettings
from fedpara_plugins_fedml.transport import peers
from harness.fedml.project import arguments, dataset, model

__all__ = ["PATIENCE", "Parties", "QueueTransport"]

PATIENCE = 120.0


class QueueTransport:
    """One party's communication manager.

    Args:
        own: its id.
        transports: all transports by id; it enters itself.
    """

    def __init__(self, own: int, transports: dict[int, QueueTransport]) -> None:
        self.own = own
        self.dead = False
        self.sent: list[Message] = []
        self.altered: Callable[[Message], Message] = lambda message: message
        self._transports = transports
        self._queue: queue.Queue[bytes | None] = queue.Queue()
        self._observers: list[Any] = []
        transports[own] = self

    def add_observer(self, observer: Any) -> None:
        self._observers.append(observer)

    def send_message(self, message: Message) -> None:
        other = self._transports.get(int(message.get_receiver_id()))
        if self.dead or other is None or other.dead:
            raise ConnectionError("nobody listens there")
        message = self.altered(message)
        self.sent.append(message)
        other._queue.put(pickle.dumps(message))

    def handle_receive_message(self) -> None:
        ready = Message(0, self.own, self.own)
        self._tell(CommunicationConstants.MSG_TYPE_CONNECTION_IS_READY, ready)
        while (data := self._queue.get()) is not None:
            message = pickle.loads(data)  # our own, of this very process
            if not self.dead:
                self._tell(message.get_type(), message)

    def stop_receive_message(self) -> None:
        self._queue.put(None)

    def _tell(self, kind: int, message: Message) -> None:
        for observer in self._observers:
            observer.receive_message(kind, message)


class Parties:
    """A server and clients.

    Args:
        monkeypatch: pytest's.
        clients: how many.
        keys: keys of the YAML.
        of_rank: other keys for some parties.
        trainers: what makes a client's trainer, by rank.
        aggregator: what makes the server's aggregator.
        models: what makes a party's model, by rank.

    Attributes:
        transports: communication managers by id.
        ended: reasons for which processes would have been ended at once.
        errors: what a party raised, by rank.
    """

    def __init__(
        self,
        monkeypatch: Any,
        clients: int = 2,
        *,
        keys: Mapping[str, Any] | None = None,
        of_rank: Mapping[int, Mapping[str, Any]] | None = None,
        trainers: Mapping[int, Callable[[Any, Any], Any]] | None = None,
        aggregator: Callable[[Any, Any], Any] | None = None,
        models: Mapping[int, Callable[[], Any]] | None = None,
    ) -> None:
        self.transports: dict[int, QueueTransport] = {}
        self.ended: list[str] = []
        self.errors: dict[int, BaseException] = {}
        self.runs: dict[int, Any] = {}
        self.clients = clients
        self._keys = {"client_num_in_total": clients, "client_num_per_round": clients}
        self._keys |= {"worker_num": clients, "comm_round": 3, **(keys or {})}
        self._of_rank = dict(of_rank or {})
        self._trainers = dict(trainers or {})
        self._aggregator = aggregator
        self._models = dict(models or {})
        self._threads: dict[int, threading.Thread] = {}

        def connect(manager: FedMLCommManager) -> None:
            manager.com_manager = QueueTransport(int(manager.args.rank), self.transports)
            manager.com_manager.add_observer(manager)

        monkeypatch.setattr(FedMLCommManager, "_init_manager", connect)
        for module in (distributed, peers):
            monkeypatch.setattr(
                module, "end_process", lambda reason, code=1: self.ended.append(reason)
            )

    def args(self, rank: int) -> Any:
        """Return FedML's arguments of one party."""
        ids = list(range(1, self.clients + 1)) if rank == 0 else [rank]
        keys = {"training_type": "cross_silo", "scenario": "horizontal", "backend": "GRPC"}
        keys |= {"comm": None, "rank": rank, "client_id_list": str(ids)}
        return arguments(**{**keys, **self._keys, **self._of_rank.get(rank, {})})

    def start(self, rank: int) -> None:
        """Start one party."""
        args = self.args(rank)  # here: FedML's initialisation is no work for threads
        net, data = self._models.get(rank, model)(), dataset(args.client_num_in_total)
        make = self._trainers.get(rank)
        trainer = make(net, args) if make else None
        aggregator = self._aggregator(net, args) if self._aggregator and rank == 0 else None

        def run() -> None:
            try:
                settings = FedMLSettings.from_args(args)
                party = distributed.Distributed(
                    settings, args, torch.device("cpu"), data, net, trainer, aggregator
                )
                self.runs[rank] = party
                party.run()
            except BaseException as error:
                self.errors[rank] = error

        self._threads[rank] = threading.Thread(target=run, name=f"party-{rank}", daemon=True)
        self._threads[rank].start()

    def start_server(self, altered: Callable[[Message], Message] | None = None) -> QueueTransport:
        """Start the server, and return its transport when it is there.

        Args:
            altered: what becomes of each message that it sends from then on.

        Raises:
            TimeoutError: it does not come.
        """
        self.start(0)
        end = time.monotonic() + PATIENCE
        while 0 not in self.transports:
            if time.monotonic() > end:
                raise TimeoutError(f"the server does not come; errors so far: {self.errors}")
            time.sleep(0.01)
        if altered is not None:
            self.transports[0].altered = altered
        return self.transports[0]

    def run(self) -> Parties:
        """Start all parties, and wait."""
        for rank in range(self.clients + 1):
            self.start(rank)
        return self.wait()

    def wait(self, *ranks: int) -> Parties:
        """Wait for some parties, or for all.

        Raises:
            TimeoutError: one goes on.
        """
        for rank in ranks or list(self._threads):
            self._threads[rank].join(PATIENCE)
            if self._threads[rank].is_alive():
                raise TimeoutError(f"party {rank} goes on; errors so far: {self.errors}")
        return self

    def cut(self, rank: int) -> None:
        """Cut a party off: nobody hears it, and it hears nobody."""
        self.transports[rank].dead = True
