"""Runs of several processes: FedML's MPI simulation, and cross-silo over its transports."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from fedml.ml.aggregator.aggregator_creator import create_server_aggregator
from fedml.ml.engine import ml_engine_adapter
from fedml.ml.trainer.trainer_creator import create_model_trainer

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.exchange import codecs_in_words
from fedpara_plugins_fedml.checks.arguments import check_contribution
from fedpara_plugins_fedml.checks.supported import is_distributed, lacks_optimizer
from fedpara_plugins_fedml.engine.client import ClientEngine
from fedpara_plugins_fedml.engine.evaluation import Evaluation
from fedpara_plugins_fedml.engine.models import client_model, converted, server_copy
from fedpara_plugins_fedml.engine.server import ServerEngine
from fedpara_plugins_fedml.modes.client_manager import TESTS, ClientManager, introduce
from fedpara_plugins_fedml.modes.placement import Silos
from fedpara_plugins_fedml.modes.run_end import dismiss
from fedpara_plugins_fedml.modes.server_manager import ServerManager
from fedpara_plugins_fedml.rules import local_rule_for, rule_for
from fedpara_plugins_fedml.settings import Settings
from fedpara_plugins_fedml.transport.peers import Post
from fedpara_plugins_fedml.transport.shutdown import end_process

__all__ = ["Distributed", "is_distributed", "lacks_optimizer", "telling_others"]

log = logging.getLogger("fedpara.fedml")


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
        settings: Settings,
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
        with telling_others(args, settings):
            _check_keys(args)
            self._make = make(model, own)

    def run(self) -> None:
        """Take part until the run ends.

        Raises:
            FedParaError: it has failed, for the reason that every party logs. With TRPC and MPI the
                process then ends here, with code 1: they would wait at exit for parties that are
                gone.
        """
        post = _post(self._args, self._settings)
        _ended(post, lambda: self._make(post).run())

    def _server(self, model: Any, aggregator: Any) -> Callable[[Post], ServerManager]:
        args, settings = self._args, self._settings
        total, a_round = int(args.client_num_in_total), int(args.client_num_per_round)
        rule = rule_for(args, settings, clients=total, a_round=a_round)
        if rule.prepares:
            raise ConfigError(
                f"federated_optimizer {rule.name!r} asks clients for gradients before any of them "
                f"trains; the plugin offers that in the single-process simulation alone"
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
        silos = Silos(total, a_round, keep=total > a_round)
        evaluation = Evaluation(args, self._device, self._dataset, aggregator, a_round)
        return lambda post: ServerManager(
            args, post, engine, silos, evaluation, settings.start_timeout
        )

    def _client(self, model: Any, trainer: Any) -> Callable[[Post], ClientManager]:
        args, settings = self._args, self._settings
        local = local_rule_for(args, settings)
        log.info(
            "fedpara: the plugin runs this client over %s: method %s, codec %s",
            args.backend, settings.config.method, codecs_in_words(settings.codec_names),
        )  # fmt: skip
        model, factors = client_model(model, settings)
        ml_engine_adapter.model_to_device(args, model, self._device)
        if trainer is None:
            trainer = local.trainer(model, args) or create_model_trainer(model, args)
        trainer.model = model
        trainer.set_id(self._rank - 1)
        engine = ClientEngine(settings, args, self._device, trainer, local, factors)
        manager = ClientManager
        return lambda post: manager(args, post, engine, self._dataset, settings.start_timeout)


class telling_others:  # noqa: N801
    """A context in which an error is told to the other processes before it is raised.

    Otherwise they would wait for this one.

    Args:
        args: FedML's.
        settings: None if these are what is wrong.
    """

    def __init__(self, args: Any, settings: Settings | None) -> None:
        self._args = args
        self._settings = settings

    def __enter__(self) -> None:
        """Nothing to do yet."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Exception):
            return
        log.critical("fedpara: %s", str(error).removeprefix("fedpara: "))
        try:
            post = _post(self._args, self._settings)
        except Exception as other:
            log.warning("fedpara: the other processes cannot be told: %s", other)
            return
        _ended(post, lambda: _tell(post, error))


def _tell(post: Post, error: Exception) -> None:
    """A server tells all that come, a client its server; then the error itself."""
    text = str(error).removeprefix("fedpara: ")
    if post.own == 0:
        dismiss(post, post.peers, FedParaError(text))
    else:
        introduce(post, post.timeout, error=text)
        dismiss(post, post.peers, FedParaError(text))
    raise error


def _post(args: Any, settings: Settings | None) -> Post:
    ids = _ids(args)
    rank = int(args.rank)
    return Post(
        args,
        rank=rank,
        size=int(args.worker_num),
        own=0 if rank == 0 else ids[0],
        peers=ids if rank == 0 else [0],
        timeout=settings.timeout if settings else Settings.timeout,
        patience=settings.start_timeout if settings else Settings.start_timeout,
    )


def _ids(args: Any) -> list[int]:
    """Of all clients on the server, of itself on a client, as the transport knows them."""
    rank = int(args.rank)
    if args.training_type == "simulation":
        return list(range(1, args.comm.Get_size())) if rank == 0 else [rank]
    return [int(each) for each in json.loads(str(args.client_id_list))]


def _check_keys(args: Any) -> None:
    """Raise if numbers of processes, clients and silos do not fit each other, or tests are none."""
    tests = str(getattr(args, "test_on_clients", None) or "no")
    if tests not in TESTS:
        raise ConfigError(f"test_on_clients is {tests!r}; expected one of {', '.join(TESTS)}")
    total, a_round = int(args.client_num_in_total), int(args.client_num_per_round)
    if not 1 <= a_round <= total:
        raise ConfigError(
            f"client_num_per_round is {a_round}, expected 1 to client_num_in_total, {total}"
        )
    if int(args.rank) != 0:
        return
    processes = len(_ids(args))
    if args.training_type == "cross_silo" and int(args.worker_num) != processes:
        raise ConfigError(
            f"worker_num is {args.worker_num}, and client_id_list names {processes} clients: give "
            f"both the same number"
        )
    if a_round < processes:
        raise ConfigError(
            f"client_num_per_round is {a_round}, and there are {processes} client processes: start "
            f"as many clients as train in a round"
        )


def _ended(post: Post, function: Callable[[], None]) -> None:
    """Run something that uses a transport, and end the transport, whatever happens."""
    try:
        function()
    except BaseException as error:
        if not post.close(orderly=False):
            if not isinstance(error, FedParaError):
                log.exception("fedpara: this process ends")
            end_process(str(error).removeprefix("fedpara: "))
        raise
    if not post.close(orderly=True):
        log.warning("fedpara: the transport did not end by itself; the run is complete")
        end_process("the transport did not end", code=0)
