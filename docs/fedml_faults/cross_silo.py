"""Faults of the cross-silo mode; the server is created without a transport."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from small import CPU, Fault, arguments, dataset, one_weight, report


class _Online:
    """A client's message that says that it is online."""

    def __init__(self, sender: int) -> None:
        self.sender = sender

    def get_sender_id(self) -> int:
        return self.sender


def first_model_is_sent_again() -> Fault:
    """Count how often the server sends its first model.

    `process_online_status` in `cross_silo/server/fedml_server_manager.py` sends it whenever a
    client reports that it is online and all are, even if it has been sent before.
    """
    from fedml.cross_silo.server.fedml_server_manager import FedMLServerManager

    arguments("FedAvg", training_type="cross_silo")
    manager = FedMLServerManager.__new__(FedMLServerManager)
    manager.client_online_mapping = {}
    manager.client_id_list_in_this_round = [1, 2]
    manager.is_initialized = False
    sent: list[int] = []
    manager.send_init_msg = lambda: sent.append(1)
    for sender in (1, 2, 1, 2):  # a client says it when it starts, and when the server asks
        manager.process_online_status("ONLINE", _Online(sender))
    return Fault(
        f"four such messages of two clients: the whole model goes out {len(sent)} times to each",
        "once, guarded by is_initialized",
        len(sent) != 1,
    )


def one_client_that_stops_stops_all() -> Fault:
    """Give the server one of two answers.

    `check_whether_all_receive` in `cross_silo/server/fedml_aggregator.py` waits for every client of
    the round, and nothing in the server has a deadline. A training that raises, or a process that
    dies, therefore leaves the server and all others waiting for ever.
    """
    import inspect

    from fedml.cross_silo.server import fedml_server_manager
    from fedml.cross_silo.server.fedml_aggregator import FedMLAggregator
    from fedml.ml.aggregator.aggregator_creator import create_server_aggregator

    args = arguments("FedAvg", training_type="cross_silo", backend="TRPC", round_idx=0)
    _, _, train_global, test_global, sizes, train, test, _ = dataset()
    aggregator = create_server_aggregator(one_weight(), args)
    made: Any = FedMLAggregator(
        train_global, test_global, 8, train, test, sizes, 2, CPU, args, aggregator
    )
    made.add_local_trained_result(0, {"weight": torch.zeros(2, 2)}, 4)
    source = inspect.getsource(fedml_server_manager)
    deadline = any(word in source for word in ("Timer(", "timeout", "deadline"))
    waits = not made.check_whether_all_receive() and not deadline
    return Fault(
        f"with one of two answers the round goes on: {not waits}; a deadline in the server "
        f"manager: {deadline}",
        "after a while the round goes on without it, or the run ends with the reason",
        waits,
    )


def raising_client_is_not_reported() -> Fault:
    """Let a client's training raise an error.

    `__train` of `cross_silo/client/fedml_client_master_manager.py` has no handler: what the user's
    trainer raises ends the client, and the server is not told.
    """
    from fedml.cross_silo.client.fedml_client_master_manager import ClientMasterManager

    manager = ClientMasterManager.__new__(ClientMasterManager)
    manager.args = arguments("FedAvg", training_type="cross_silo", scenario="horizontal")
    manager.round_idx = 0
    sent: list[object] = []
    manager.send_message = sent.append

    class Trainer:
        def train(self, round_idx: int) -> None:
            raise ValueError("a batch of the wrong shape")

    manager.trainer_dist_adapter = Trainer()
    try:
        getattr(manager, "_ClientMasterManager__train")()  # noqa: B009  (a name is mangled here)
    except ValueError:
        return Fault(
            f"messages to the server after a training that raised: {len(sent)}",
            "one that says so",
            not sent,
        )
    return Fault("the client goes on", "the server is told", not sent)


def assessments_end_in_an_error() -> Fault:
    """Run FedML's assessments of contributions.

    `core/contribution` gives `test` a model where that expects data (LOO, GTG), and gives
    `FedMLAggOperator.agg` a dict where that expects a list (MR).
    """
    from fedml.core import Context
    from fedml.cross_silo.server.fedml_aggregator import FedMLAggregator
    from fedml.ml.aggregator.aggregator_creator import create_server_aggregator

    errors = {}
    for kind in ("LOO", "GTG", "MR"):
        keys = {"enable_contribution": True, "contribution_alg": kind, "round_idx": 0}
        args = arguments("FedAvg", training_type="cross_silo", backend="TRPC", **keys)
        _, _, train_global, test_global, sizes, train, test, _ = dataset()
        aggregator = create_server_aggregator(one_weight(), args)
        made: Any = FedMLAggregator(
            train_global, test_global, 8, train, test, sizes, 2, CPU, args, aggregator
        )
        for client in range(2):
            made.add_local_trained_result(client, OrderedDict(one_weight().state_dict()), 4)
        made.aggregate()
        made.test_on_server_for_all_clients(0)
        context = Context()
        context.add(Context.KEY_CLIENT_ID_LIST_IN_THIS_ROUND, [0, 1])
        context.add(Context.KEY_METRICS_ON_LAST_ROUND, (-1, 0, 0, 0))  # or they leave it at once
        try:
            made.assess_contribution()
        except Exception as error:
            errors[kind] = f"{kind} ends with a {type(error).__name__}"
    return Fault("; ".join(errors.values()), "shares of the clients", len(errors) == 3)


REPRODUCTIONS = (
    assessments_end_in_an_error,
    first_model_is_sent_again,
    one_client_that_stops_stops_all,
    raising_client_is_not_reported,
)

if __name__ == "__main__":
    report(*REPRODUCTIONS)
