"""FedMLRunner, for projects that change one import: ``from fedpara_plugins_fedml import ...``."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import fedml
from fedml.ml.aggregator.aggregator_creator import create_server_aggregator
from fedml.ml.trainer.trainer_creator import create_model_trainer

from fedpara_plugins import ConfigError
from fedpara_plugins_fedml.client import ClientHalf
from fedpara_plugins_fedml.distributed import (
    Distributed,
    is_distributed,
    lacks_optimizer,
    looks_distributed,
    telling_others,
)
from fedpara_plugins_fedml.models import converted, server_copy
from fedpara_plugins_fedml.rules import local_rule_for, rule_for
from fedpara_plugins_fedml.server import ServerHalf
from fedpara_plugins_fedml.settings import Settings
from fedpara_plugins_fedml.sp import SingleProcess

__all__ = ["FedMLRunner"]

log = logging.getLogger("fedpara.fedml")

ENTRIES = (
    "train_data_num", "test_data_num", "train_data_global", "test_data_global",
    "train_data_local_num_dict", "train_data_local_dict", "test_data_local_dict", "class_num",
)  # fmt: skip


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
        with telling_others(args, None) if looks_distributed(args) else nullcontext():
            settings = Settings.from_args(args)
        engine = settings.active or settings.mend or lacks_optimizer(args)
        if algorithm_flow is not None or not engine:
            super().__init__(
                args, device, dataset, model, client_trainer, server_aggregator, algorithm_flow
            )
            return
        if is_distributed(args):
            with telling_others(args, settings):
                check_dataset(dataset)
            self.runner: Distributed | SingleProcess = Distributed(
                settings, args, device, dataset, model, client_trainer, server_aggregator
            )
            return
        check_dataset(dataset)
        self.runner = _single_process(
            settings, args, device, dataset, model, client_trainer, server_aggregator
        )


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
    rule = rule_for(args, settings, clients=clients, a_round=a_round)
    local = local_rule_for(args, settings)
    model = converted(model, settings)
    own = server_copy(model)
    if aggregator is None:
        aggregator = create_server_aggregator(own, args)
    if trainer is None:
        trainer = local.trainer(model, args) or create_model_trainer(model, args)
    aggregator.model, trainer.model = own, model
    aggregator.set_id(-1)
    server = ServerHalf(settings, args, device, dataset, aggregator, rule)
    return SingleProcess(args, dataset, server, ClientHalf(settings, args, device, trainer, local))


def check_dataset(dataset: Any) -> None:
    """Raise unless a data set has the form that FedML documents.

    Raises:
        ConfigError: names what is wrong, and the form.
    """
    form = f"[{', '.join(ENTRIES)}]"
    if not isinstance(dataset, Sequence) or len(dataset) != len(ENTRIES):
        size = f" of {len(dataset)} entries" if isinstance(dataset, Sequence) else ""
        raise ConfigError(
            f"fedpara: FedMLRunner got a {type(dataset).__name__}{size} as its data set; expected "
            f"the {len(ENTRIES)} entries {form}"
        )
    for place, name in ((4, ENTRIES[4]), (5, ENTRIES[5]), (6, ENTRIES[6])):
        if not isinstance(dataset[place], Mapping):
            raise ConfigError(
                f"fedpara: entry {place} of the data set, {name}, is a "
                f"{type(dataset[place]).__name__}; expected a dict by client index. The whole form "
                f"is {form}"
            )
