"""Every undocumented part of FedML that the adapter uses, in one place.

No other module of the adapter imports anything of FedML but ``fedml`` and the two classes that
users subclass, ``ClientTrainer`` and ``ServerAggregator`` of ``fedml.core``. FedML documents little
and exports everything, so each entry states what it relies on (*Stands on*), and why no documented
way serves (*Not public*). All entries were seen in FedML 0.9.6, to which the adapter is pinned;
there has been no release since February 2025. Each has a test in
``compat_tests/test_fedml_seams.py``.

`environment` is the exception: it finds out why FedML does not import, and imports none of it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from fedml import mlops
from fedml.core import ClientTrainer, Context, ServerAggregator
from fedml.core.distributed.communication.message import Message
from fedml.core.distributed.fedml_comm_manager import FedMLCommManager
from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy
from fedml.cross_silo.server.fedml_aggregator import FedMLAggregator
from fedml.cross_silo.server.message_define import MyMessage
from fedml.ml.aggregator.aggregator_creator import create_server_aggregator
from fedml.ml.engine.ml_engine_adapter import model_to_device
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from fedml.ml.trainer.my_model_trainer_nwp import ModelTrainerNWP
from fedml.ml.trainer.my_model_trainer_tag_prediction import ModelTrainerTAGPred
from fedml.ml.trainer.trainer_creator import create_model_trainer
from fedml.simulation.sp.fedavg.fedavg_api import FedAvgAPI

__all__ = [
    "CHECK",
    "FEDML_FINISH",
    "FEDML_TYPES",
    "MODEL_KEY",
    "ONLINE",
    "ONLINE_STATUS",
    "OPTIMIZER_ERROR",
    "READY",
    "FedMLAggregator",
    "FedMLCommManager",
    "Message",
    "assesses_contribution",
    "averaging",
    "client_status_training",
    "create_model_trainer",
    "create_server_aggregator",
    "evaluate_clients",
    "evaluate_validation_set",
    "generate_validation_set",
    "guard_listeners",
    "is_default_trainer",
    "local_dp_is_on",
    "mlops",
    "model_to_device",
    "modules_with_runner",
    "note_client_models",
    "note_silos",
    "receiving_threads",
    "replace_queue",
    "replaced_root_logger",
    "sample_clients",
    "sample_silos",
    "server_status_running",
    "stop_loop",
]

# Imported as they are -----------------------------------------------------------------------------
#
# `mlops`: FedML's own marks of a run's progress, which its platform shows.
#   Not public: a project calls few of them; FedML's own runners call the rest.
# `create_model_trainer`, `create_server_aggregator`: the defaults where a project gives none.
#   Not public: FedML's runners make them inside of their constructors.
# `FedMLCommManager`, `Message`: FedML's transports, all behind one class.
#   Not public: only FedML's own managers of servers and clients subclass it.
# `FedMLAggregator`: tests of the server's model and assessments, as in FedML's cross-silo server.
#   Not public: FedML's server manager alone calls its methods ``test_on_server_for_all_clients``
#   and ``assess_contribution``.
# `model_to_device`: as FedML's cross-silo client places its model.
#   Not public: part of its support of other engines than torch.

# The runner ---------------------------------------------------------------------------------------

OPTIMIZER_ERROR = ("Exception",)
"""Arguments of the error that FedML raises for an optimizer that it does not have.

Stands on: ``raise Exception("Exception")`` in ``fedml.simulation.simulator``.
Not public: the error has neither a type nor a text of its own.
"""


def modules_with_runner(runner: type[Any]) -> Iterator[ModuleType]:
    """Yield all modules of FedML that hold a runner's class under its name.

    Stands on: FedML's modules import the class from each other, each into its own namespace.
    Not public: FedML has no registry of runners.
    """
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "fedml" and vars(module).get(runner.__name__) is runner:
            yield module


def replaced_root_logger() -> logging.Logger | None:
    """Return the logger that FedML has put in the place of the root logger; None if it has not.

    Stands on: ``fedml.init`` sets ``logging.root``; the real root, to which all other loggers go on
    sending their records, has no handler then.
    Not public: FedML documents no logger.
    """
    return logging.root if logging.root is not logging.Logger.manager.root else None


# Trainers and aggregators -------------------------------------------------------------------------

DEFAULT_TRAINERS = (ModelTrainerCLS, ModelTrainerNWP, ModelTrainerTAGPred)


def is_default_trainer(trainer: ClientTrainer) -> bool:
    """Return whether a trainer trains with FedML's default loop for its data set.

    Stands on: the classes of ``fedml.ml.trainer``; their losses are those of `losses.default_loss`.
    Not public: trainers do not say what loss they minimise.
    """
    return type(trainer).train in [default.train for default in DEFAULT_TRAINERS]


def assesses_contribution(aggregator: ServerAggregator) -> bool:
    """Return whether an aggregator has an assessment of contributions of its own.

    Stands on: FedML calls ``ServerAggregator.assess_contribution`` in its cross-silo server.
    Not public: the method is, what it does by default is not.
    """
    own = type(aggregator).assess_contribution
    return bool(own is not ServerAggregator.assess_contribution)


@contextlib.contextmanager
def averaging(args: Any) -> Iterator[None]:
    """Let FedML's aggregation average models in this context, whatever the optimizer.

    Stands on: ``agg_operator`` looks at ``args.federated_optimizer``, and averages under FedAvg's
    name alone.
    Not public: ``ServerAggregator.aggregate`` is, what it does by optimizer is not.
    """
    name = getattr(args, "federated_optimizer", "FedAvg")
    args.federated_optimizer = "FedAvg"
    try:
        yield
    finally:
        args.federated_optimizer = name


def local_dp_is_on() -> bool:
    """Return whether clients add noise to their models after training.

    Stands on: ``FedMLDifferentialPrivacy``, one object a process, set up by `fedml.init`.
    Not public: the YAML's keys are, what FedML makes of them is not.
    """
    return bool(FedMLDifferentialPrivacy.get_instance().is_local_dp_enabled())


def note_silos(silos: Sequence[int]) -> None:
    """Let assessments of contributions know which data silos took part in a round.

    Stands on: ``fedml.core.Context``, one object a process, and its key.
    Not public: FedML's server manager writes it.
    """
    Context().add(Context.KEY_CLIENT_ID_LIST_IN_THIS_ROUND, list(silos))


def note_client_models(models: Sequence[tuple[float, Mapping[str, Any]]]) -> None:
    """Let assessments of contributions know a round's models, each with its number of examples.

    Stands on, not public: as `note_silos`.
    """
    Context().add(Context.KEY_CLIENT_MODEL_LIST, list(models))


# Sampling and tests -------------------------------------------------------------------------------


def sample_clients(round_index: int, total: int, per_round: int) -> list[int]:
    """Return a round's clients as FedML's single process draws them.

    Stands on: ``FedAvgAPI._client_sampling``, which uses nothing of its object.
    Not public: it belongs to the simulation's own loop.
    """
    return [int(index) for index in FedAvgAPI._client_sampling(None, round_index, total, per_round)]


def sample_silos(round_index: int, total: int, per_round: int) -> list[int]:
    """Return a round's data silos as FedML's cross-silo server draws them.

    Stands on: ``FedMLAggregator.data_silo_selection``, which uses nothing of its object.
    Not public: FedML's server manager calls it.
    """
    drawn = FedMLAggregator.data_silo_selection(None, round_index, total, per_round)
    return [int(index) for index in drawn]


def evaluate_clients(view: Any, round_index: int) -> None:
    """Test the model on all clients' data, and report the means, as FedML's single process does.

    Stands on: ``FedAvgAPI._local_test_on_all_clients``, which calls ``update_local_dataset`` and
    ``local_test`` of ``client_list[0]`` and reads ``args`` and three dicts of data by client.
    Not public: it belongs to the simulation's own loop.

    Args:
        view: has these attributes.
        round_index: 0 for the first.

    Raises:
        ZeroDivisionError: if no client has data.
    """
    FedAvgAPI._local_test_on_all_clients(view, round_index)


def evaluate_validation_set(view: Any, round_index: int) -> None:
    """Test the model on a part of the global data; FedML does so for stackoverflow's data.

    Stands on: ``FedAvgAPI._local_test_on_validation_set``.
    Not public: as `evaluate_clients`.
    """
    FedAvgAPI._local_test_on_validation_set(view, round_index)


def generate_validation_set(view: Any) -> None:
    """Draw that part of the global data.

    Stands on: ``FedAvgAPI._generate_validation_set``, which the test calls.
    Not public: as `evaluate_clients`.
    """
    FedAvgAPI._generate_validation_set(view)


# Progress -----------------------------------------------------------------------------------------


def client_status_training() -> None:
    """Mark this process as a client that trains.

    Stands on: ``mlops.log_training_status`` and its constant.
    Not public: see `mlops` above.
    """
    mlops.log_training_status(mlops.ClientConstants.MSG_MLOPS_CLIENT_STATUS_TRAINING)


def server_status_running() -> None:
    """Mark this process as a server that runs.

    Stands on: ``mlops.log_aggregation_status`` and its constant.
    Not public: see `mlops` above.
    """
    mlops.log_aggregation_status(mlops.ServerConstants.MSG_MLOPS_SERVER_STATUS_RUNNING)


# Messages -----------------------------------------------------------------------------------------

READY: int = MyMessage.MSG_TYPE_CONNECTION_IS_READY
"""Type of the message by which a transport says to its own process that it is up.

Stands on: ``MyMessage`` of FedML's cross-silo server.
Not public: FedML's managers use these types among themselves.
"""

ONLINE: int = MyMessage.MSG_TYPE_C2S_CLIENT_STATUS
"""Type of FedML's message by which a client says that it is there.

Stands on, not public: as `READY`.
"""

CHECK: int = MyMessage.MSG_TYPE_S2C_CHECK_CLIENT_STATUS
"""Type of FedML's message by which a server asks its clients whether they are there.

Stands on, not public: as `READY`.
"""

ONLINE_STATUS = {MyMessage.MSG_ARG_KEY_CLIENT_STATUS: "ONLINE"}
"""Field of FedML's ``ONLINE``, without which its server does not count the client.

Stands on: ``FedMLServerManager.handle_message_client_status_update``.
Not public: as `READY`.
"""

FEDML_FINISH: int = MyMessage.MSG_TYPE_S2C_FINISH
"""Type of FedML's message by which a server ends its cross-silo clients.

Stands on, not public: as `READY`.
"""

FEDML_TYPES = (1, 2, 3, 4, 5, 6, 7, 8)
"""All types of messages between FedML's own servers and clients.

Stands on, not public: as `READY`.
"""

MODEL_KEY: str = Message.MSG_ARG_KEY_MODEL_PARAMS
"""Key of a message's model, which MQTT_S3 moves to the store.

Stands on: ``Message`` and FedML's communication managers.
Not public: see `Message` above.
"""

# Communication managers ---------------------------------------------------------------------------


def replace_queue(manager: Any, moved: Callable[[queue.Queue[Any]], queue.Queue[Any]]) -> None:
    """Replace the queue that a manager's receiving loop polls, if it has one.

    Stands on: ``grpc_servicer.message_q``, ``trpc_servicer.message_q``, and for MPI ``q_receiver``
    with the attribute ``q`` of its receiving threads.
    Not public: the queue is the transport's own.

    Args:
        manager: such as a GRPCCommManager.
        moved: returns a new queue with the entries of the old one.
    """
    servicer = getattr(manager, "grpc_servicer", None) or getattr(manager, "trpc_servicer", None)
    if servicer is not None:
        servicer.message_q = moved(servicer.message_q)
    elif getattr(manager, "q_receiver", None) is not None:  # MPI
        manager.q_receiver = moved(manager.q_receiver)
        for thread in receiving_threads(manager):
            thread.q = manager.q_receiver


def guard_listeners(manager: Any, log: logging.Logger) -> None:
    """Let MQTT's manager survive what it cannot read, such as the name of no object of the store.

    Of such a message its sender alone is passed on, with a type that says so.

    Stands on: ``_on_message_impl``, which ``_on_message`` looks up for each message; ``_notify``;
    and ``mqtt_mgr._client``, paho's client, whose ``suppress_exceptions`` covers other listeners.
    Not public: an error ends FedML's loop, and nothing comes to the process any more.
    """
    read = getattr(manager, "_on_message_impl", None)
    if read is None:
        return

    def guarded(message: Any) -> None:
        try:
            read(message)
        except Exception as error:
            log.warning("fedpara: FedML cannot read a message: %r", error)
            with contextlib.suppress(Exception):
                fields = json.loads(message.payload)
                names = (Message.MSG_ARG_KEY_SENDER, Message.MSG_ARG_KEY_RECEIVER)
                kept = {name: fields[name] for name in names}
                manager._notify({Message.MSG_ARG_KEY_TYPE: "not read by FedML", **kept})

    manager._on_message_impl = guarded
    manager.mqtt_mgr._client.suppress_exceptions = True


def receiving_threads(manager: Any) -> list[Any]:
    """Return the receiving threads of MPI's manager.

    Stands on: ``_server_receive_thread`` and ``_client_receive_thread``; each has ``stop``.
    Not public: the manager's ``stop_receive_message`` fails if a message is left in a queue.
    """
    threads = (manager._server_receive_thread, manager._client_receive_thread)
    return [thread for thread in threads if thread is not None]


def stop_loop(manager: Any, backend: str) -> None:
    """Let the receiving loop of MPI's or TRPC's manager end, without waiting for other parties.

    Stands on: ``_stop_running`` for MPI and ``is_running`` for TRPC.
    Not public: the manager's ``stop_receive_message`` waits for all parties (TRPC).
    """
    if backend == "MPI":
        manager._stop_running = True
    else:
        manager.is_running = False
