"""FedML's single-process simulation, with messages between server and clients as in a real run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from fedml import mlops
from fedml.simulation.sp.fedavg.fedavg_api import FedAvgAPI

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins_fedml.engine.client import ClientEngine
from fedpara_plugins_fedml.engine.server import ServerEngine
from fedpara_plugins_fedml.messages.head import Purpose

__all__ = ["SingleProcess"]

log = logging.getLogger("fedpara.fedml")

FIGURES = ("test_correct", "test_loss", "test_total")
"""What FedML's test adds up, of each client."""


class SingleProcess:
    """What FedMLRunner runs.

    Clients are sampled, evaluated and logged by FedML's own ``FedAvgAPI``.

    Args:
        args: FedML's.
        dataset: FedML's eight entries.
        server: the server's engine.
        clients: the clients'.
        ask_aggregator: whether the aggregator is the user's, who may test in ``test_all``.
    """

    def __init__(
        self,
        args: Any,
        dataset: Sequence[Any],
        server: ServerEngine,
        clients: ClientEngine,
        *,
        ask_aggregator: bool = False,
    ) -> None:
        self.server = server
        self._ask_aggregator = ask_aggregator
        self.clients = clients
        self._args = args
        self._dataset = dataset
        (_, _, _, _, self._sizes, self._train, self._test, _) = dataset

    def run(self) -> None:
        """Train for ``comm_round`` rounds, and test as FedML does."""
        mlops.log_training_status(mlops.ClientConstants.MSG_MLOPS_CLIENT_STATUS_TRAINING)
        mlops.log_aggregation_status(mlops.ServerConstants.MSG_MLOPS_SERVER_STATUS_RUNNING)
        mlops.log_round_info(self._args.comm_round, -1)
        try:
            while self.server.round < self._args.comm_round:
                self._round()
        finally:
            self.server.close()
        self.server.save_checkpoint()
        mlops.log_training_finished_status()
        mlops.log_aggregation_finished_status()

    def _round(self) -> None:
        number = self.server.round
        logging.info("################Communication round : %d", number)
        args = self._args
        sample = FedAvgAPI._client_sampling(
            None, number, args.client_num_in_total, args.client_num_per_round
        )
        names = [str(int(index)) for index in sample]
        self.server.begin(names)
        if self.server.rule.prepares:
            names = [name for name in names if self._visit(name, "prepare")]
            self.server.end_preparation()
        for name in names:
            self._visit(name, "train")
        self.server.end()
        self._evaluate(number)
        mlops.log_round_info(args.comm_round, number)

    def _visit(self, name: str, purpose: Purpose) -> bool:
        """Exchange one message; whether the client's answer counts."""
        index = int(name)
        data = self._train[index], self._test[index], self._sizes[index]
        try:
            for _ in range(2):  # again for a client that lost what the message was coded against
                reply = self.clients.train(name, self.server.message(name, purpose), *data)
                if self.server.receive(name, reply):
                    return True
            raise FedParaError("it lost what the message was coded against, twice")
        except ConfigError:
            raise
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
        if not (self._ask_aggregator and self.server.tests_itself()):
            try:
                view = _View(self)
                if args.dataset.startswith("stackoverflow") and not last:
                    FedAvgAPI._local_test_on_validation_set(view, number)
                else:
                    FedAvgAPI._local_test_on_all_clients(view, number)
                view.note()
            except ZeroDivisionError:
                log.warning("fedpara: clients are not tested: none has data for it")
            except _NoFiguresError as error:
                log.warning("fedpara: clients are not tested: %s", error)
        if last:
            for index in range(args.client_num_in_total):
                self.clients.export(str(index), self.server.state)


class _NoFiguresError(Exception):
    """The user's trainer does not say how good a model is."""


class _View(SimpleNamespace):
    """What FedAvgAPI's test looks at, with one client that tells from the data whose turn it is.

    FedML's own calls every client number 0 there.
    """

    def __init__(self, run: SingleProcess) -> None:
        self._run = run
        self._tested = _Tested(run)
        super().__init__(
            args=run._args,
            client_list=[self._tested],
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
        FedAvgAPI._generate_validation_set(self)

    def note(self) -> None:
        """Put the clients' accuracy and loss into the ledger."""
        found = self._tested.figures
        count = sum(each["test_total"] for each in found)
        if count:
            means = {
                "accuracy": sum(each["test_correct"] for each in found) / count,
                "loss": sum(each["test_loss"] for each in found) / count,
            }
            server = self._run.server
            server.accounting.ledger.log(server.round, means, source="clients")


class _Tested:
    """The client of `_View`.

    Attributes:
        figures: of each client on its test data.
    """

    def __init__(self, run: SingleProcess) -> None:
        self.figures: list[Mapping[str, float]] = []
        self._run = run
        self._data: tuple[Any, Any] = (None, None)

    def update_local_dataset(self, client: int, train: Any, test: Any, size: Any) -> None:
        """The next client: load the server's model and this client's private part."""
        name, loader = (None, test) if train is None else (str(test[0]), test[1])
        self._data = train, loader
        self._run.clients.load(name, self._run.server.state)

    def local_test(self, use_test_data: bool) -> Mapping[str, float]:
        """Of the client whose model was loaded."""
        found = self._run.clients.test(self._data[use_test_data])
        if not isinstance(found, Mapping) or not all(name in found for name in FIGURES):
            raise _NoFiguresError(
                f"the trainer's test() returns {type(found).__name__}, expected a dict with "
                f"{', '.join(FIGURES)}"
            )
        if use_test_data:
            self.figures.append(found)
        return found
