"""FedML's single-process simulation, with messages between server and clients as in a real run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from fedml import mlops
from fedml.simulation.sp.fedavg.fedavg_api import FedAvgAPI

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins_fedml.client import ClientHalf
from fedpara_plugins_fedml.server import ServerHalf

__all__ = ["SingleProcess"]

log = logging.getLogger("fedpara.fedml")


class SingleProcess:
    """What FedMLRunner runs.

    Clients are sampled, evaluated and logged by FedML's own ``FedAvgAPI``.

    Args:
        args: FedML's.
        dataset: FedML's eight entries.
        server: the server's half.
        clients: the clients'.
    """

    def __init__(
        self, args: Any, dataset: Sequence[Any], server: ServerHalf, clients: ClientHalf
    ) -> None:
        self.server = server
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
        for name in names:
            self._visit(name)
        self.server.end()
        self._evaluate(number)
        mlops.log_round_info(args.comm_round, number)

    def _visit(self, name: str) -> None:
        index = int(name)
        data = self._train[index], self._test[index], self._sizes[index]
        try:
            for _ in range(2):  # again for a client that lost what the message was coded against
                reply = self.clients.train(name, self.server.message(name), *data)
                if self.server.receive(name, reply):
                    return
            raise FedParaError("it lost what the message was coded against, twice")
        except ConfigError:
            raise
        except FedParaError as error:
            self.server.exclude(name, error)

    # Testing

    def _evaluate(self, number: int) -> None:
        args = self._args
        if number != args.comm_round - 1 and number % args.frequency_of_the_test:
            return
        view = _View(self)
        FedAvgAPI._local_test_on_all_clients(view, number)


class _View(SimpleNamespace):
    """What FedAvgAPI's test looks at, with one client that tells from the data whose turn it is.

    FedML's own calls every client number 0 there.
    """

    def __init__(self, run: SingleProcess) -> None:
        super().__init__(
            args=run._args,
            client_list=[_Tested(run)],
            train_data_local_dict=_numbered(run._train),
            test_data_local_dict=_numbered(run._test),
            train_data_local_num_dict=run._sizes,
        )


def _numbered(data: Mapping[int, Any]) -> dict[int, Any]:
    return {index: loader if loader is None else (index, loader) for index, loader in data.items()}


class _Tested:
    """The client of `_View`."""

    def __init__(self, run: SingleProcess) -> None:
        self._run = run
        self._train: Any = None
        self._test: Any = None

    def update_local_dataset(
        self, client: int, train: tuple[int, Any], test: tuple[int, Any], size: int
    ) -> None:
        """The next client: load the server's model and this client's private part."""
        self._train, self._test = train[1], test[1]
        self._run.clients.load(str(train[0]), self._run.server.state)

    def local_test(self, use_test_data: bool) -> Any:
        """Of the client whose model was loaded."""
        return self._run.clients.test(self._test if use_test_data else self._train)
