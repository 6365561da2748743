"""FedMLRunner, for projects that change one import: ``from fedpara_plugins_fedml import ...``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import fedml
from fedml.ml.aggregator.aggregator_creator import create_server_aggregator
from fedml.ml.trainer.trainer_creator import create_model_trainer

from fedpara_plugins import ConfigError
from fedpara_plugins_fedml.checks.announcement import announce, warn_of_idle_files
from fedpara_plugins_fedml.checks.arguments import (
    check_args,
    check_clients,
    check_dataset,
    check_tests,
)
from fedpara_plugins_fedml.checks.files import check_files
from fedpara_plugins_fedml.checks.supported import (
    is_distributed,
    lacks_optimizer,
    looks_distributed,
)
from fedpara_plugins_fedml.engine.client import ClientEngine
from fedpara_plugins_fedml.engine.models import client_model, server_copy
from fedpara_plugins_fedml.engine.server import ServerEngine
from fedpara_plugins_fedml.logs import follow_fedml
from fedpara_plugins_fedml.modes.distributed import Distributed, telling_others
from fedpara_plugins_fedml.modes.single_process import SingleProcess
from fedpara_plugins_fedml.rules import RULES, local_rule_for, rule_for
from fedpara_plugins_fedml.settings import Settings

__all__ = ["FedMLRunner"]


class FedMLRunner(fedml.runner.FedMLRunner):  # type: ignore[misc]
    """FedML's runner, which works as the keys ``fedpara_*`` of the YAML say.

    With none of them it is FedML's own.

    Args:
        args: FedML's.
        device: FedML's.
        dataset: the eight entries that FedML documents.
        model: any torch module.
        client_trainer: the user's; honoured in single-process simulations too.
        server_aggregator: likewise.
        algorithm_flow: FedML's, untouched.

    Raises:
        ConfigError: an unknown key or optimizer, or a data set of another form.
        ConversionError: the model cannot be converted.
    """

    def __init__(
        self,
        args: Any,
        device: Any,
        dataset: Any,
        model: Any,
        client_trainer: Any = None,
        server_aggregator: Any = None,
        algorithm_flow: Any = None,
    ) -> None:
        follow_fedml()
        with telling_others(args, None) if looks_distributed(args) else nullcontext():
            settings = Settings.from_args(args)
        given = client_trainer, server_aggregator
        engine = settings.active or settings.mend or lacks_optimizer(args)
        if algorithm_flow is not None or not engine:
            warn_of_idle_files(settings)
            with _explained(args):
                super().__init__(args, device, dataset, model, *given, algorithm_flow)
            return
        if is_distributed(args):
            with telling_others(args, settings):
                check_args(settings, args)
                check_dataset(dataset)
                first = int(args.rank) == 0
                check_files(settings, server=first, client=not first)
            self.runner: Distributed | SingleProcess = Distributed(
                settings, args, device, dataset, model, *given
            )
            return
        check_args(settings, args)
        check_dataset(dataset)
        check_files(settings, server=True, client=True)
        self.runner = _single_process(settings, args, device, dataset, model, *given)


@contextmanager
def _explained(args: Any) -> Iterator[None]:
    """FedML says Exception("Exception") where it has no such optimizer."""
    try:
        yield
    except Exception as error:
        if error.args != ("Exception",):
            raise
        name = getattr(args, "federated_optimizer", None)
        raise ConfigError(
            f"federated_optimizer {name!r}: FedML has no such optimizer with training_type "
            f"{args.training_type!r} and backend {args.backend!r}; the plugin's engine "
            f"(fedpara_mend: true) has {', '.join(RULES)}"
        ) from error


def _single_process(
    settings: Settings,
    args: Any,
    device: Any,
    dataset: Any,
    model: Any,
    trainer: Any,
    aggregator: Any,
) -> SingleProcess:
    clients, a_round = args.client_num_in_total, args.client_num_per_round
    check_clients(dataset, clients)
    check_tests(args)
    rule = rule_for(args, settings, clients=clients, a_round=a_round)
    local = local_rule_for(args, settings)
    given = {"client_trainer": trainer, "server_aggregator": aggregator}
    announce(settings, args, rule, honoured=[n for n, value in given.items() if value is not None])
    model, factors = client_model(model, settings)
    own = server_copy(factors)
    if aggregator is None:
        aggregator = create_server_aggregator(own, args)
    if trainer is None:
        trainer = local.trainer(model, args) or create_model_trainer(model, args)
    aggregator.model, trainer.model = own, model
    aggregator.set_id(-1)
    server = ServerEngine(settings, args, device, dataset, aggregator, rule)
    engines = server, ClientEngine(settings, args, device, trainer, local, factors)
    users = given["server_aggregator"] is not None
    return SingleProcess(args, dataset, *engines, ask_aggregator=users)
