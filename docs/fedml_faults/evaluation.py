"""Further faults, for any model: wrong client ids, averages of buffers, and keys."""

from __future__ import annotations

from typing import Any

import torch
from small import CPU, Fault, arguments, dataset, one_weight, report
from torch import nn


def evaluation_of_everybody_is_client_0() -> Fault:
    """Record the trainer's id during the clients' tests.

    `_local_test_on_all_clients` in `simulation/sp/fedavg/fedavg_api.py` gives the trainer id 0 for
    every client that it tests. FedProx, SCAFFOLD and FedDyn do the same.
    """
    from fedml.simulation.sp.fedavg import FedAvgAPI

    data = dataset()
    api = FedAvgAPI(arguments("FedAvg"), CPU, data, one_weight())
    ids: list[int] = []
    trainer = api.model_trainer
    own = trainer.test

    def test(loader: Any, device: Any, args: Any) -> Any:
        if any(loader is data[6][client] for client in range(2)):
            ids.append(trainer.id)
        return own(loader, device, args)

    trainer.test = test
    api.train()
    return Fault(
        f"the test data of clients 0 and 1 are tested under the ids {ids}", "[0, 1]", ids != [0, 1]
    )


def training_ids_are_missing() -> Fault:
    """Record the trainer's id in trainings: `simulation/sp/fedopt/client.py` never sets it."""
    from fedml.simulation.sp.fedopt.fedopt_api import FedOptAPI

    args = arguments("FedOpt", server_optimizer="sgd")
    api = FedOptAPI(args, CPU, dataset(), one_weight())
    ids: list[int] = []
    api.model_trainer.train = lambda data, device, args: ids.append(api.model_trainer.id)
    api.train()
    return Fault(f"clients 0 and 1 train under the ids {ids}", "[0, 1]", ids != [0, 1])


def integer_buffers_are_cut_off() -> Fault:
    """Average BatchNorm's counters: FedAvg does it as floats and loads them without rounding."""
    from fedml.simulation.sp.fedavg import FedAvgAPI

    api = FedAvgAPI(arguments("FedAvg"), CPU, dataset(), nn.Sequential(nn.BatchNorm1d(2)))
    replies = [(4, {"0.num_batches_tracked": torch.tensor(count)}) for count in (5, 6, 6)]
    model = nn.BatchNorm1d(2)
    average = api._aggregate(replies)["0.num_batches_tracked"]
    model.num_batches_tracked.copy_(average)
    got = int(model.num_batches_tracked)
    return Fault(f"clients that count 5, 6 and 6 batches average to {got}", "5.67, so 6", got != 6)


def feddyn_refuses_buffers() -> Fault:
    """Train with buffers: `simulation/sp/feddyn/feddyn_trainer.py` asserts that there are none."""
    from fedml.simulation.sp.feddyn.feddyn_trainer import FedDynTrainer

    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    try:
        FedDynTrainer(dataset(), model, CPU, arguments("FedDyn", feddyn_alpha=0.1))
    except AssertionError as error:
        return Fault(f"AssertionError: {error}", "buffers are averaged", True)
    return Fault("a model with BatchNorm is taken", "buffers are averaged", False)


def hierarchical_reads_other_keys() -> Fault:
    """Train with `learning_rate` alone.

    `simulation/sp/hierarchical_fl/client.py` reads `args.lr` and `args.wd` where all others read
    `learning_rate` and `weight_decay`. FedML's example of it sets both, and sets the one that is
    not read to 0.03.
    """
    from fedml.simulation.sp.hierarchical_fl.trainer import HierarchicalTrainer

    keys = {"group_method": "random", "group_num": 1, "group_comm_round": 1}
    api = HierarchicalTrainer(arguments("HierarchicalFL", **keys), CPU, dataset(), one_weight())
    try:
        api.train()
    except AttributeError as error:
        return Fault(f"AttributeError: {error}", "the rate is learning_rate", True)
    return Fault("it trains with learning_rate", "the rate is learning_rate", False)


def aggregating_fails_under_other_optimizers() -> Fault:
    """Call `ServerAggregator.aggregate` of the public interface under FedOpt.

    `torch_aggregator` in `ml/aggregator/agg_operator.py` has `pass` for FedOpt and FedNova, so that
    the call fails under both.
    """
    from fedml.ml.aggregator.aggregator_creator import create_server_aggregator

    args = arguments("FedOpt", server_optimizer="sgd")
    aggregator = create_server_aggregator(one_weight(), args)
    try:
        aggregator.aggregate([(1.0, {"weight": torch.ones(1)}), (1.0, {"weight": torch.ones(1)})])
    except UnboundLocalError as error:
        return Fault(f"UnboundLocalError: {error}", "the weighted mean of the clients", True)
    return Fault("it gives a mean", "the weighted mean of the clients", False)


REPRODUCTIONS = (
    evaluation_of_everybody_is_client_0,
    training_ids_are_missing,
    integer_buffers_are_cut_off,
    feddyn_refuses_buffers,
    hierarchical_reads_other_keys,
    aggregating_fails_under_other_optimizers,
)

if __name__ == "__main__":
    report(*REPRODUCTIONS)
