"""Faults of the MPI simulation; its server objects are created without MPI."""

from __future__ import annotations

from typing import Any

from small import CPU, Fault, arguments, dataset, one_weight, report


def _made(kind: type, optimizer: str, **keys: Any) -> Any:
    """Return the aggregator of the MPI simulation, with FedML's default ServerAggregator."""
    from fedml.ml.aggregator.aggregator_creator import create_server_aggregator

    args = arguments(optimizer, backend="MPI", round_idx=0, **keys)
    _, _, train_global, test_global, sizes, train, test, _ = dataset()
    aggregator = create_server_aggregator(one_weight(), args)
    return kind(train_global, test_global, 8, train, test, sizes, 2, CPU, args, aggregator)


def fedopt_has_no_adam() -> Fault:
    """Set `server_optimizer` to Adam.

    `simulation/mpi/fedopt/FedOptAggregator.py` passes a momentum to whatever class
    `server_optimizer` names.
    """
    from fedml.simulation.mpi.fedopt.FedOptAggregator import FedOptAggregator

    try:
        _made(FedOptAggregator, "FedOpt", server_optimizer="adam", server_momentum=0.9)
    except TypeError as error:
        return Fault(f"server_optimizer: adam: TypeError: {error}", "FedAdam", True)
    return Fault("server_optimizer: adam is accepted", "FedAdam", False)


def fedopt_test_raises() -> Fault:
    """Run the server's test.

    `test_on_server_for_all_clients` of the same file indexes the tuple that the default
    aggregator's `test` returns. The run ends at its first test.
    """
    from fedml.simulation.mpi.fedopt.FedOptAggregator import FedOptAggregator

    made = _made(FedOptAggregator, "FedOpt", server_optimizer="sgd", server_momentum=0.9)
    return _tested(made)


def fedprox_test_raises() -> Fault:
    """Run the same test in `simulation/mpi/fedprox/FedProxAggregator.py`."""
    from fedml.simulation.mpi.fedprox.FedProxAggregator import FedProxAggregator

    return _tested(_made(FedProxAggregator, "FedProx", fedprox_mu=0.1))


def _tested(made: Any) -> Fault:
    try:
        made.test_on_server_for_all_clients(0)
    except TypeError as error:
        return Fault(f"the server's test: TypeError: {error}", "an accuracy in the log", True)
    return Fault("the server's test runs", "an accuracy in the log", False)


def async_fedavg_log_raises() -> Fault:
    """Run a client's first training.

    `simulation/mpi/async_fedavg/AsyncFedAvgClientManager.py` formats the client's index, a string
    on the wire, by `%d`.
    """
    from fedml.simulation.mpi.async_fedavg import AsyncFedAvgClientManager

    kind = next(
        value
        for name, value in vars(AsyncFedAvgClientManager).items()
        if name.endswith("ClientManager") and not name.startswith("FedML")
    )
    manager = kind.__new__(kind)
    manager.round_idx = 0
    train = getattr(manager, f"_{kind.__name__}__train")
    try:
        train({}, "0")
    except TypeError as error:
        return Fault(f"the first training: TypeError: {error}", "the client trains", True)
    except AttributeError:
        return Fault("the log line passes", "the client trains", False)
    return Fault("it trains", "the client trains", False)


REPRODUCTIONS = (
    fedopt_has_no_adam,
    fedopt_test_raises,
    fedprox_test_raises,
    async_fedavg_log_raises,
)

if __name__ == "__main__":
    report(*REPRODUCTIONS)
