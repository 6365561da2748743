"""The process of a client, which trains on request until the server ends the run or is gone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import uuid4

from fedpara_plugins import FedParaError, MismatchError
from fedpara_plugins_fedml.engine.client import ClientEngine
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.modes.handshake import SERVER, connect, leave, refuse
from fedpara_plugins_fedml.seams import client_status_training, mlops
from fedpara_plugins_fedml.transport.peers import Endpoint
from fedpara_plugins_fedml.transport.protocol import (
    CLOSE,
    FINISH,
    HELLO,
    REPLY,
    TASK,
    UNREADABLE,
    WELCOME,
    Event,
)

__all__ = ["TESTS", "ClientManager"]

MOST_UNREAD = 5
"""Messages that a client asks for once more because it could not read them."""

TESTS = ("no", "before_aggregation", "after_aggregation", "both")
"""Values of the key ``test_on_clients``."""


class ClientManager:
    """Runs one client process.

    Args:
        args: FedML's.
        endpoint: to the server.
        engine: the client's engine.
        dataset: FedML's eight entries.
        start_timeout: seconds within which the server must answer.
    """

    def __init__(
        self,
        args: Any,
        endpoint: Endpoint,
        engine: ClientEngine,
        dataset: Sequence[Any],
        start_timeout: float,
    ) -> None:
        self._args = args
        self._endpoint = endpoint
        self._engine = engine
        (_, _, _, _, self._sizes, self._train, self._test, _) = dataset
        self._start_timeout = start_timeout
        self._unread = 0
        self._tests = str(getattr(args, "test_on_clients", None) or "no")

    def run(self) -> None:
        """Serve until the run ends.

        Raises:
            FedParaError: if it has failed; the message is the server's reason, or why it is gone.
        """
        mlops.log_sys_perf(self._args)
        event: Event | None = connect(self._endpoint, self._start_timeout)
        client_status_training()
        try:
            while not self._is_last(event):
                event = self._endpoint.next()
        finally:
            self._engine.log_missing()
        mlops.stop_sys_perf()
        mlops.log_training_finished_status()
        leave(self._endpoint)

    def _is_last(self, event: Event | None) -> bool:
        """Handle an event, and return whether it is the last of the run."""
        if event is None or event.kind in (WELCOME, CLOSE):
            return False
        if event.kind == TASK:
            self._train_silo(event)
        elif event.kind == FINISH:
            if event.data is None:
                return True
            self._take_final(event)
        elif event.kind == UNREADABLE and self._unread < MOST_UNREAD:
            self._unread += 1
            log.warning(
                "fedpara: %s came from the server, which is asked to send it again", event.name
            )
            self._endpoint.send(SERVER, HELLO, session=uuid4().hex)
        else:
            refuse(self._endpoint, event)
        return False

    def _has_silo(self, number: int) -> bool:
        """Return whether a run has a silo: whatever the server names becomes part of a path."""
        return 0 <= number < int(self._args.client_num_in_total)

    def _train_silo(self, event: Event) -> None:
        silo = event.number("silo")
        if not self._has_silo(silo):
            log.warning("fedpara: the server asks for the silo %d, which there is not", silo)
            self._endpoint.send(SERVER, REPLY, None, silo=silo)
            return
        number = str(getattr(self._args, "round_idx", 0))
        mlops.event("train", event_started=True, event_value=number)
        reply = self._engine.train(
            str(silo),
            event.data,
            self._train.get(silo),
            self._test.get(silo),
            self._sizes.get(silo, 0),
            loaded=lambda: self._run_test(silo, "after_aggregation"),
        )
        mlops.event("train", event_started=False, event_value=number)
        mlops.event("comm_c2s", event_started=True, event_value=number)
        self._endpoint.send(SERVER, REPLY, reply, silo=silo)
        self._run_test(silo, "before_aggregation")

    def _run_test(self, silo: int, when: str) -> None:
        """Test on the silo's data if the project asks for it; an error does not prevent a reply."""
        first = getattr(self._args, "round_idx", 0) == 0
        if self._tests not in (when, "both") or (when == "after_aggregation" and first):
            return
        try:
            self._engine.test(self._test.get(silo))
        except Exception:
            log.exception("fedpara: the test of data silo %d has failed", silo)

    def _take_final(self, event: Event) -> None:
        silo = event.number("silo")
        try:
            names = [name for name in event.text("silos").split() if name.isdecimal()]
            silos = list(dict.fromkeys(map(int, names)))
            if unknown := [each for each in (silo, *silos) if not self._has_silo(each)]:
                raise MismatchError(f"it is of the silo {unknown[0]}, which there is not")
            state = self._engine.take_final(str(silo), event.data)
            for each in silos:
                self._engine.export(str(each), state)
        except FedParaError as error:
            log.warning("fedpara: the last model cannot be used: %s", error)
            self._endpoint.send(SERVER, REPLY, None, silo=silo)
