"""Runs of several processes: FedML's MPI simulation, and cross-silo over its transports."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.exchange import codecs_in_words
from fedpara_plugins_fedml.checks.arguments import check_contribution
from fedpara_plugins_fedml.engine.client import ClientEngine
from fedpara_plugins_fedml.engine.evaluation import ServerEvaluation
from fedpara_plugins_fedml.engine.models import client_model, converted, server_copy
from fedpara_plugins_fedml.engine.server import ServerEngine
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.modes.client_manager import TESTS, ClientManager
from fedpara_plugins_fedml.modes.handshake import take_no_part
from fedpara_plugins_fedml.modes.placement import SiloPlacement
from fedpara_plugins_fedml.modes.run_end import announce_failure
from fedpara_plugins_fedml.modes.server_manager import ServerManager
from fedpara_plugins_fedml.rules import local_rule_for, rule_for
from fedpara_plugins_fedml.seams import (
    create_model_trainer,
    create_server_aggregator,
    model_to_device,
)
from fedpara_plugins_fedml.settings import FedMLSettings
from fedpara_plugins_fedml.transport.peers import Endpoint
from fedpara_plugins_fedml.transport.shutdown import end_process

__all__ = ["Distributed", "reporting_errors"]


class Distributed:
    """One process of such a run, server or client by ``args.rank``.

    Args:
        settings: of the run.
        args: FedML's.
        device: FedML's.
        dataset: FedML's eight entries.
        model: the project's.
        trainer: the user's ClientTrainer, or None.
        aggregator: the user's ServerAggregator, or None.
    """

    def __init__(
        self,
        settings: FedMLSettings,
        args: Any,
        device: Any,
        dataset: Sequence[Any],
        model: Any,
        trainer: Any,
        aggregator: Any,
    ) -> None:
        self._settings = settings
        self._args = args
        self._device = device
        self._dataset = dataset
        self._rank = int(args.rank)
        make = self._server if self._rank == 0 else self._client
        own = aggregator if self._rank == 0 else trainer
        with reporting_errors(args, settings):
            _check_keys(args)
            self._make_manager = make(model, own)

    def run(self) -> None:
        """Take part until the run ends.

        Raises:
            FedParaError: if it has failed; every process logs the reason. With TRPC and MPI the
                process ends here then, with code 1: at exit they would wait for processes that are
                gone.
        """
        endpoint = _endpoint(self._args, self._settings)
        _run_and_close(endpoint, lambda: self._make_manager(endpoint).run())

    def _server(self, model: Any, aggregator: Any) -> Callable[[Endpoint], ServerManager]:
        args, settings = self._args, self._settings
        total, per_round = int(args.client_num_in_total), int(args.client_num_per_round)
        rule = rule_for(args, settings, clients=total)
        if rule.prepares:
            raise ConfigError(
                f"federated_optimizer {rule.name!r} asks clients for gradients before any of them "
                f"trains; the plugin supports that only in the single-process simulation"
            )
        log.info(
            "fedpara: the plugin's engine runs %s over %s: method %s, codec %s. FedML's hooks of "
            "trainer and aggregator are called as in its own cross-silo mode",
            rule.name, args.backend, settings.config.method, codecs_in_words(settings.codec_names),
        )  # fmt: skip
        own = server_copy(converted(model, settings))
        if aggregator is None:
            aggregator = create_server_aggregator(own, args)
        check_contribution(args, aggregator)
        aggregator.model = own
        aggregator.set_id(0 if args.training_type == "cross_silo" else -1)
        engine = ServerEngine(settings, args, self._device, self._dataset, aggregator, rule)
        placement = SiloPlacement(
            total,
            per_round,
            keep=total > per_round,
            movable=args.training_type == "simulation",
        )
        evaluation = ServerEvaluation(args, self._device, self._dataset, aggregator, per_round)
        return lambda endpoint: ServerManager(
            args, endpoint, engine, placement, evaluation, settings.start_timeout
        )

    def _client(self, model: Any, trainer: Any) -> Callable[[Endpoint], ClientManager]:
        args, settings = self._args, self._settings
        local = local_rule_for(args, settings)
        log.info(
            "fedpara: the plugin runs this client over %s: method %s, codec %s",
            args.backend, settings.config.method, codecs_in_words(settings.codec_names),
        )  # fmt: skip
        model, factors = client_model(model, settings)
        model_to_device(args, model, self._device)
        if trainer is None:
            trainer = local.trainer(model, args) or create_model_trainer(model, args)
        trainer.model = model
        trainer.set_id(self._rank - 1)
        engine = ClientEngine(settings, args, self._device, trainer, local, factors)
        return lambda endpoint: ClientManager(
            args, endpoint, engine, self._dataset, settings.start_timeout
        )


class reporting_errors:  # noqa: N801
    """A context in which an error is sent to the other processes before it is raised.

    Otherwise they would wait for this one.

    Args:
        args: FedML's.
        settings: None if the settings cause the error.
    """

    def __init__(self, args: Any, settings: FedMLSettings | None) -> None:
        self._args = args
        self._settings = settings

    def __enter__(self) -> None:
        """Do nothing yet."""

    def __exit__(self, kind: Any, error: BaseException | None, _trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        log.critical("fedpara: %s", str(error).removeprefix("fedpara: "))
        try:
            endpoint = _endpoint(self._args, self._settings)
        except Exception as other:
            log.warning("fedpara: the other processes cannot be notified: %s", other)
            return
        _run_and_close(endpoint, lambda: _report(endpoint, error))
        # Here only under ``mpirun``, which ends all others if one ends with another code than 0.
        end_process(str(error).removeprefix("fedpara: "), code=0)


def _report(endpoint: Endpoint, error: Exception) -> None:
    """Send an error to the clients that come, or to the server, and raise it.

    It is not raised where the run has gone on, and ended well, without this client.
    """
    text = str(error).removeprefix("fedpara: ")
    if endpoint.own == 0:
        announce_failure(endpoint, endpoint.peers, FedParaError(text))
    elif take_no_part(endpoint, text):
        return
    raise error


def _endpoint(args: Any, settings: FedMLSettings | None) -> Endpoint:
    ids = _ids(args)
    rank = int(args.rank)
    return Endpoint(
        args,
        rank=rank,
        size=int(args.worker_num),
        own=0 if rank == 0 else ids[0],
        peers=ids if rank == 0 else [0],
        timeout=settings.timeout if settings else FedMLSettings.timeout,
        start_timeout=settings.start_timeout if settings else FedMLSettings.start_timeout,
    )


def _ids(args: Any) -> list[int]:
    """Return the transport's ids: on the server of all clients, on a client its own."""
    rank = int(args.rank)
    if args.training_type == "simulation":
        return list(range(1, args.comm.Get_size())) if rank == 0 else [rank]
    return [int(each) for each in json.loads(str(args.client_id_list))]


def _check_keys(args: Any) -> None:
    """Raise if numbers of processes, clients and silos do not match, or a test is unknown."""
    tests = str(getattr(args, "test_on_clients", None) or "no")
    if tests not in TESTS:
        raise ConfigError(f"test_on_clients is {tests!r}; expected one of {', '.join(TESTS)}")
    total, per_round = int(args.client_num_in_total), int(args.client_num_per_round)
    if not 1 <= per_round <= total:
        raise ConfigError(
            f"client_num_per_round is {per_round}, expected 1 to client_num_in_total, {total}"
        )
    if int(args.rank) != 0:
        return
    processes = len(_ids(args))
    if args.training_type == "cross_silo" and int(args.worker_num) != processes:
        raise ConfigError(
            f"worker_num is {args.worker_num}, and client_id_list names {processes} clients: give "
            f"both the same number"
        )
    if per_round < processes:
        raise ConfigError(
            f"client_num_per_round is {per_round}, and there are {processes} client processes: "
            f"start as many clients as train in a round"
        )


def _run_and_close(endpoint: Endpoint, function: Callable[[], None]) -> None:
    """Run a function that uses a transport, and end the transport, whatever happens."""
    try:
        function()
    except BaseException as error:
        if not endpoint.close(orderly=False):
            if not isinstance(error, FedParaError):
                log.exception("fedpara: this process ends")
            end_process(str(error).removeprefix("fedpara: "))
        raise
    if not endpoint.close(orderly=True):
        log.warning("fedpara: the transport did not end by itself; the run is complete")
        end_process("the transport did not end", code=0)
