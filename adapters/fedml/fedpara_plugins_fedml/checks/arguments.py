"""Checks of a project's keys and data set, before the first round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedpara_plugins import ConfigError
from fedpara_plugins.codecs import Codec
from fedpara_plugins_fedml.seams import assesses_contribution
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = [
    "check_args",
    "check_clients",
    "check_contribution",
    "check_dataset",
    "check_tests",
    "is_lossy",
]

ENTRIES = (
    "train_data_num", "test_data_num", "train_data_global", "test_data_global",
    "train_data_local_num_dict", "train_data_local_dict", "test_data_local_dict", "class_num",
)  # fmt: skip
FORM = f"[{', '.join(ENTRIES)}]"
BY_CLIENT = (4, 5, 6)
SIZES = 4

NEEDED = ("comm_round", "client_num_in_total", "client_num_per_round")

CLIENTS_CLIP = {
    "nbafl": "NbAFL bounds each weight of a client's model by C",
    "dp_clip": "dp_clip bounds the norm of a client's update by clipping_norm",
}
"""Kinds of differential privacy in FedML whose clients guarantee a bound, with that bound."""

ASSESSMENTS = ("LOO", "GTG", "MR")
"""FedML's own assessments of contributions, by ``contribution_alg``."""


def is_lossy(codec: Codec) -> bool:
    """Return whether decoded tensors may differ from the encoded ones."""
    return not all(stage.lossless or stage.needs_reference for stage in codec.stages)


def check_args(settings: FedMLSettings, args: Any) -> None:
    """Raise for a project that the plugin's engine cannot run.

    Raises:
        ConfigError: if a key's value is wrong or not supported; names the key and the remedy.
    """
    _check_numbers(settings, args)
    _check_engine(settings, args)
    _check_privacy(settings, args)


def _check_numbers(settings: FedMLSettings, args: Any) -> None:
    for key in NEEDED:
        if not isinstance(getattr(args, key, None), int):
            got = repr(getattr(args, key)) if hasattr(args, key) else "nothing"
            raise ConfigError(f"fedpara: the YAML's key {key} must be an integer, got {got}")
        if getattr(args, key) < 1 and key != "comm_round":
            raise ConfigError(f"fedpara: {key} is {getattr(args, key)}, expected 1 or more")
    if settings.min_clients > (most := min(args.client_num_per_round, args.client_num_in_total)):
        raise ConfigError(
            f"fedpara: fedpara_min_clients is {settings.min_clients}, and no round has more than "
            f"{most} clients (client_num_per_round)"
        )


def _check_engine(settings: FedMLSettings, args: Any) -> None:
    if getattr(args, "enable_fhe", False):
        raise ConfigError(
            "fedpara: enable_fhe encrypts whole dense models on the clients, so the server can "
            "neither decode a codec's payload nor fill in private factors: remove the fedpara_* "
            "keys, or set enable_fhe: false"
        )
    engine = getattr(args, "ml_engine", "torch")
    if str(engine) not in ("torch", "pytorch"):
        raise ConfigError(
            f"fedpara: ml_engine {engine!r}: the plugin works on torch models; remove the "
            f"fedpara_* keys"
        )
    if (
        str(getattr(args, "federated_optimizer", "")) == "Mime"
        and settings.config.schedule == "decoupled"
    ):
        raise ConfigError(
            "fedpara: Mime makes steps of its own, which fedpara_schedule: decoupled cannot tell "
            "apart: the shared factors would never be trained. Set fedpara_schedule: joint, or "
            "another federated_optimizer"
        )


def _check_privacy(settings: FedMLSettings, args: Any) -> None:
    if not getattr(args, "enable_dp", False):
        return
    kind = str(getattr(args, "dp_solution_type", "")).strip()
    if settings.trains_dense and kind != "cdp":
        raise ConfigError(
            f"fedpara: enable_dp with dp_solution_type {kind} bounds clients' updates or adds "
            f"noise to them, and fedpara_local: dense projects them onto the factors and rescales "
            f"them afterwards, which breaks the bound and changes the noise: set fedpara_local: "
            f"factors, or dp_solution_type: cdp, with which the server clips"
        )
    if kind in CLIENTS_CLIP and is_lossy(settings.uplink):
        raise ConfigError(
            f"fedpara: {CLIENTS_CLIP[kind]}, and the codec {settings.uplink.name!r} changes what "
            f"the server decodes, so the bound would not hold there: set fedpara_uplink_codec: "
            f"lossless, or none"
        )


def check_contribution(args: Any, aggregator: Any) -> None:
    """Raise for FedML's own assessments of contributions, each of which raises an error later.

    Raises:
        ConfigError: if one of them is enabled; names it and the remedy.
    """
    kind = getattr(args, "contribution_alg", None)
    if not getattr(args, "enable_contribution", False) or kind not in ASSESSMENTS:
        return
    if not assesses_contribution(aggregator):
        raise ConfigError(
            f"fedpara: contribution_alg {kind}: in FedML 0.9.6 this assessment calls the "
            f"aggregator's test with a model in the place of the data, and its mean with a dict in "
            f"the place of a list, and ends the run. Set enable_contribution: false, or write "
            f"assess_contribution in your ServerAggregator"
        )


def check_dataset(dataset: Any) -> None:
    """Raise unless a data set has the form that FedML documents.

    Raises:
        ConfigError: if it has another form; names the difference, and the whole form.
    """
    if not isinstance(dataset, Sequence) or len(dataset) != len(ENTRIES):
        size = f" of {len(dataset)} entries" if isinstance(dataset, Sequence) else ""
        raise ConfigError(
            f"fedpara: FedMLRunner got a {type(dataset).__name__}{size} as its data set; expected "
            f"the {len(ENTRIES)} entries {FORM}"
        )
    for place in BY_CLIENT:
        if not isinstance(dataset[place], Mapping):
            raise ConfigError(
                f"fedpara: entry {place} of the data set, {ENTRIES[place]}, has the type "
                f"{type(dataset[place]).__name__}; expected a dict by client index, from 0. The "
                f"whole form is {FORM}"
            )
        counts = [hasattr(value, "__float__") for value in dataset[place].values()]
        if place == SIZES and not all(counts):
            raise ConfigError(
                f"fedpara: entry {place} of the data set, {ENTRIES[place]}, does not hold numbers "
                f"of examples. The whole form is {FORM}"
            )
        if place != SIZES and any(counts):
            raise ConfigError(
                f"fedpara: entry {place} of the data set, {ENTRIES[place]}, holds numbers in the "
                f"place of data loaders. The whole form is {FORM}"
            )


def check_tests(args: Any) -> None:
    """Raise unless a single-process project says how often it tests.

    FedML would find that out after the first round.

    Raises:
        ConfigError: if ``frequency_of_the_test`` is not a number of rounds.
    """
    often = getattr(args, "frequency_of_the_test", None)
    if not isinstance(often, int) or often < 1:
        raise ConfigError(
            f"fedpara: the YAML's key frequency_of_the_test must be a number of rounds, 1 or more, "
            f"got {'nothing' if often is None else repr(often)}"
        )


def check_clients(dataset: Sequence[Any], clients: int) -> None:
    """Raise unless a data set has the data of every client.

    Raises:
        ConfigError: if some are missing; names the first.
    """
    for place in BY_CLIENT:
        missing = [index for index in range(clients) if index not in dataset[place]]
        if missing:
            raise ConfigError(
                f"fedpara: client_num_in_total is {clients}, and entry {place} of the data set, "
                f"{ENTRIES[place]}, has no client {missing[0]} ({len(missing)} are missing): give "
                f"it the keys 0 to {clients - 1}, or set client_num_in_total to their number"
            )
