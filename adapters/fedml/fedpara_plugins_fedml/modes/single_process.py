"""FedML's single-process simulation, with messages between server and clients as in a real run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from fedpara_plugins import FedParaError
from fedpara_plugins_fedml.engine.client import ClientEngine
from fedpara_plugins_fedml.engine.server import ServerEngine
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.messages.head import Purpose
from fedpara_plugins_fedml.seams import (
    client_status_training,
    evaluate_clients,
    evaluate_validation_set,
    generate_validation_set,
    mlops,
    sample_clients,
    server_status_running,
)

__all__ = ["SingleProcess"]

SUMS = ("test_correct", "test_loss", "test_total")
"""Sums over a client's test data, from which FedML computes the means."""


class SingleProcess:
    """A run of server and clients in one process, with the method that FedML's runner calls.

    FedML's own code samples and evaluates the clients.

    Args:
        args: FedML's.
        dataset: FedML's eight entries.
        server: the server's engine.
        clients: the clients' engine.
        aggregator_tests: whether the aggregator is the user's, whose ``test_all`` may test.
    """

    def __init__(
        self,
        args: Any,
        dataset: Sequence[Any],
        server: ServerEngine,
        clients: ClientEngine,
        *,
        aggregator_tests: bool = False,
    ) -> None:
        self.server = server
        self._aggregator_tests = aggregator_tests
        self.clients = clients
        self._args = args
        self._dataset = dataset
        (_, _, _, _, self._sizes, self._train, self._test, _) = dataset

    def run(self) -> None:
        """Train for ``comm_round`` rounds, and test as FedML does.

        Raises:
            FedParaError: the run has failed, or is complete and its checkpoint could not be
                written.
        """
        client_status_training()
        server_status_running()
        mlops.log_round_info(self._args.comm_round, -1)
        try:
            while self.server.round < self._args.comm_round:
                self._round()
            self.server.save_checkpoint()
        finally:
            self.clients.log_missing()
            self.server.close()
        mlops.log_training_finished_status()
        mlops.log_aggregation_finished_status()
        self.server.raise_failure()

    def _round(self) -> None:
        number = self.server.round
        logging.info("################Communication round : %d", number)
        args = self._args
        sample = sample_clients(number, args.client_num_in_total, args.client_num_per_round)
        names = [str(index) for index in sample]
        self.server.begin(names)
        if self.server.rule.prepares:
            names = [name for name in names if self._exchange(name, "prepare")]
            self.server.end_preparation()
        for name in names:
            self._exchange(name, "train")
        self.server.end()
        self._evaluate(number)
        mlops.log_round_info(args.comm_round, number)

    def _exchange(self, name: str, purpose: Purpose) -> bool:
        """Send a client a message and take its reply; return whether the reply counts."""
        index = int(name)
        data = self._train[index], self._test[index], self._sizes[index]
        try:
            for _ in range(2):  # again for a client that lacks the reference of the message
                reply = self.clients.train(name, self.server.message(name, purpose), *data)
                if self.server.receive(name, reply):
                    return True
            raise FedParaError("it lost the reference of the message, twice")
        except FedParaError as error:
            self.server.exclude(name, error)
            return False

    # Testing

    def _evaluate(self, number: int) -> None:
        """Test every client with the server's model and its own private part.

        Nothing is sent for it, as in FedML's own simulation.
        """
        args, last = self._args, number == self._args.comm_round - 1
        if not last and number % args.frequency_of_the_test:
            return
        if not (self._aggregator_tests and self.server.tests_itself()):
            try:
                view = _TestView(self)
                if args.dataset.startswith("stackoverflow") and not last:
                    evaluate_validation_set(view, number)
                else:
                    evaluate_clients(view, number)
                view.record_means()
            except ZeroDivisionError:
                log.warning("fedpara: clients are not tested: none has data for it")
            except _NoMetricsError as error:
                log.warning("fedpara: clients are not tested: %s", error)
        if last:
            for index in range(args.client_num_in_total):
                self.clients.export(str(index), self.server.state)


class _NoMetricsError(Exception):
    """The user's trainer returns no metrics."""


class _TestView(SimpleNamespace):
    """The object that FedML's tests read, with one client that stands for all.

    The test data contain the client's number, because FedML passes the number 0 for every client.
    """

    def __init__(self, run: SingleProcess) -> None:
        self._run = run
        self._client = _TestClient(run)
        super().__init__(
            args=run._args,
            client_list=[self._client],
            train_data_local_dict=dict(run._train.items()),
            test_data_local_dict={
                index: None if loader is None else (index, loader)
                for index, loader in run._test.items()
            },
            train_data_local_num_dict=run._sizes,
            test_global=run._dataset[3],
            val_global=None,
        )

    def _generate_validation_set(self) -> None:
        generate_validation_set(self)

    def record_means(self) -> None:
        """Write the clients' accuracy and loss to the ledger."""
        found = self._client.sums
        count = sum(each["test_total"] for each in found)
        if count:
            means = {
                "accuracy": sum(each["test_correct"] for each in found) / count,
                "loss": sum(each["test_loss"] for each in found) / count,
            }
            server = self._run.server
            server.accounting.ledger.log(server.round, means, source="clients")


class _TestClient:
    """The client of `_TestView`.

    Attributes:
        sums: of each client on its test data.
    """

    def __init__(self, run: SingleProcess) -> None:
        self.sums: list[Mapping[str, float]] = []
        self._run = run
        self._data: tuple[Any, Any] = (None, None)

    def update_local_dataset(self, client: int, train: Any, test: Any, size: Any) -> None:
        """Load the server's model and the private part of the next client."""
        name, loader = (None, test) if train is None else (str(test[0]), test[1])
        self._data = train, loader
        self._run.clients.load(name, self._run.server.state)

    def local_test(self, use_test_data: bool) -> Mapping[str, float]:
        """Return the sums of the client whose model was loaded."""
        found = self._run.clients.test(self._data[use_test_data])
        if not isinstance(found, Mapping) or not all(name in found for name in SUMS):
            raise _NoMetricsError(
                f"the trainer's test() returns {type(found).__name__}, expected a dict with "
                f"{', '.join(SUMS)}"
            )
        if use_test_data:
            self.sums.append(found)
        return found
