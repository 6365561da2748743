"""The plugin's FedMLRunner: projects import it in the place of FedML's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import fedml

from fedpara_plugins import ConfigError
from fedpara_plugins.support import StateDirHold
from fedpara_plugins_fedml.checks.announcement import log_engine, warn_about_files
from fedpara_plugins_fedml.checks.arguments import (
    check_args,
    check_clients,
    check_dataset,
    check_tests,
)
from fedpara_plugins_fedml.checks.files import check_files
from fedpara_plugins_fedml.checks.state_dir import hold_for
from fedpara_plugins_fedml.checks.supported import (
    is_distributed,
    lacks_optimizer,
    looks_distributed,
)
from fedpara_plugins_fedml.engine.client import ClientEngine
from fedpara_plugins_fedml.engine.models import client_model, server_copy
from fedpara_plugins_fedml.engine.server import ServerEngine
from fedpara_plugins_fedml.logs import show_among_fedml_logs
from fedpara_plugins_fedml.modes.distributed import Distributed, reporting_errors
from fedpara_plugins_fedml.modes.single_process import SingleProcess
from fedpara_plugins_fedml.rules import RULES, local_rule_for, rule_for
from fedpara_plugins_fedml.seams import (
    OPTIMIZER_ERROR,
    create_model_trainer,
    create_server_aggregator,
)
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["FedMLRunner"]


class FedMLRunner(fedml.FedMLRunner):  # type: ignore[misc]
    """FedML's runner with the plugin, as the keys ``fedpara_*`` of the YAML say.

    Without such keys it behaves as FedML's runner.

    Args:
        args: FedML's.
        device: FedML's.
        dataset: the eight entries that FedML documents.
        model: any torch module.
        client_trainer: the user's; used in single-process simulations too.
        server_aggregator: likewise.
        algorithm_flow: FedML's, passed on unchanged.

    Raises:
        ConfigError: if a key or optimizer is unknown, or the data set has another form.
        ConversionError: if the model cannot be converted.
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
        show_among_fedml_logs()
        self._hold: StateDirHold | None = None
        with reporting_errors(args, None) if looks_distributed(args) else nullcontext():
            settings = FedMLSettings.from_args(args)
        given = client_trainer, server_aggregator
        use_engine = settings.active or settings.mend or lacks_optimizer(args)
        if algorithm_flow is not None or not use_engine:
            warn_about_files(settings)
            with _naming_optimizer(args):
                super().__init__(args, device, dataset, model, *given, algorithm_flow)
            return
        if is_distributed(args):
            with reporting_errors(args, settings):
                check_args(settings, args)
                check_dataset(dataset)
                self._hold = hold_for(self, settings, args, alone=False)
                first = int(args.rank) == 0
                check_files(settings, server=first, client=not first)
            self.runner: Distributed | SingleProcess = Distributed(
                settings, args, device, dataset, model, *given
            )
            return
        check_args(settings, args)
        check_dataset(dataset)
        self._hold = hold_for(self, settings, args, alone=True)
        check_files(settings, server=True, client=True)
        self.runner = _single_process(settings, args, device, dataset, model, *given)

    def run(self) -> None:
        """Take part in the run until it ends.

        Raises:
            FedParaError: it has failed, or is complete and its checkpoint could not be written.
        """
        try:
            super().run()
        finally:
            if self._hold is not None:
                self._hold.release()


@contextmanager
def _naming_optimizer(args: Any) -> Iterator[None]:
    """Replace FedML's error for an optimizer that it does not have by one that says so."""
    try:
        yield
    except Exception as error:
        if error.args != OPTIMIZER_ERROR:
            raise
        name = getattr(args, "federated_optimizer", None)
        raise ConfigError(
            f"federated_optimizer {name!r}: FedML has no such optimizer with training_type "
            f"{args.training_type!r} and backend {args.backend!r}; the plugin's engine "
            f"(fedpara_mend: true) has {', '.join(RULES)}"
        ) from error


def _single_process(
    settings: FedMLSettings,
    args: Any,
    device: Any,
    dataset: Any,
    model: Any,
    trainer: Any,
    aggregator: Any,
) -> SingleProcess:
    clients = args.client_num_in_total
    check_clients(dataset, clients)
    check_tests(args)
    rule = rule_for(args, settings, clients=clients)
    local = local_rule_for(args, settings)
    given = {"client_trainer": trainer, "server_aggregator": aggregator}
    log_engine(settings, args, rule, used=[n for n, value in given.items() if value is not None])
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
    own_tests = given["server_aggregator"] is not None
    return SingleProcess(args, dataset, *engines, aggregator_tests=own_tests)
