"""The command ``fedpara``: plan, doctor, export, inspect, report.

Exit codes: 0, done; 1, a model or file is refused, or the doctor found something that needs
attention; 2, the command line cannot be used. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from fedpara_plugins.cli.arguments import (
    Handler,
    config_options,
    parse_arguments,
    parse_count,
    read_config,
)
from fedpara_plugins.cli.doctor import check_model, check_training
from fedpara_plugins.cli.environment import check_environment
from fedpara_plugins.cli.export import adapter_from, dense_from
from fedpara_plugins.cli.inspect_file import inspect_file
from fedpara_plugins.cli.plan import Link, choose_gamma, plan_traffic
from fedpara_plugins.cli.step_cost import parse_input, step_cost
from fedpara_plugins.cli.training_settings import (
    TrainingSettings,
    check_training_settings,
    training_settings_of,
)
from fedpara_plugins.cli.user_code import current_directory_importable, model_from, training_from
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, FedParaError
from fedpara_plugins.ledger.page import read_runs, render_page
from fedpara_plugins.models.checkpoint_files import Checkpoint, read_checkpoint
from fedpara_plugins.models.checkpoints import save_dense
from fedpara_plugins.models.peft_export import save_peft
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.support.findings import Finding
from fedpara_plugins.support.units import parse_rate, parse_size, readable_bytes
from fedpara_plugins.text import printable

__all__ = ["main"]

TRAINING_FLAGS = ("optimizer", "lr", "weight_decay", "mu")
"""Settings of the user's training, of which the doctor reports the effect on factors."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the words after ``fedpara``; the process's own if None.

    Returns:
        The exit code.
    """
    try:
        with current_directory_importable():
            parsed = parse_arguments(arguments, _HANDLERS)
            return int(parsed.run(parsed))
    except BrokenPipeError:
        # The reader (`| head`) has exited. Python would report that again when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _failed(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except FedParaError as error:
        return _failed(str(error), 2 if isinstance(error, ConfigError) else 1)


def _failed(message: str, code: int) -> int:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    sys.stderr.write(f"fedpara: error: {printable('; '.join(lines))}\n")
    return code


def _print(text: object) -> None:
    sys.stdout.write(f"{text}\n")


def _plan(parsed: argparse.Namespace) -> int:
    config = read_config(parsed)
    link = Link(
        up=None if parsed.uplink is None else parse_rate(parsed.uplink),
        down=None if parsed.downlink is None else parse_rate(parsed.downlink),
    )
    target = None if parsed.target_bytes is None else parse_size(parsed.target_bytes)
    clients = parse_count("--clients", parsed.clients)
    rounds = parse_count("--rounds", parsed.rounds)
    inputs = [parse_input(text) for text in parsed.input]
    model = model_from(parsed.model)
    if target is not None:
        if "gamma" in config_options(parsed):
            raise ConfigError("--target-bytes chooses gamma: leave out --gamma")
        config = choose_gamma(model, config, target=target)
    step = step_cost(model, config, inputs) if inputs else None  # raises before anything is printed
    if target is not None:
        _print(f"gamma {config.gamma:g} is the largest that fits {target:,} bytes\n")
    _print(plan_traffic(model, config, link=link, clients=clients, rounds=rounds))
    if step is not None:
        _print(f"\n{step}")
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    config = read_config(parsed)
    findings = check_environment()
    try:
        findings += _check_users_training(parsed, config)
    except FedParaError:
        # What needs attention may be the cause of the error.
        _print_findings(finding for finding in findings if finding.level == "attention")
        raise
    _print_findings(findings)
    bad = sum(finding.level == "attention" for finding in findings)
    _print(
        f"{bad} of {len(findings)} findings need attention" if bad else "nothing needs attention"
    )
    return 1 if bad else 0


def _check_users_training(parsed: argparse.Namespace, config: FedParaConfig) -> list[Finding]:
    """Return the findings about the user's model, optimizer and settings, as far as given."""
    if parsed.model is not None and parsed.optimizer_check:
        model, optimizer = training_from(parsed.model)
        return [
            *check_training(model, optimizer),
            *check_training_settings(model, training_settings_of(optimizer)),
        ]
    given = any(vars(parsed)[name] is not None for name in TRAINING_FLAGS)
    if parsed.model is not None:
        model = model_from(parsed.model)
        found = check_model(model, config)
        return found + check_training_settings(model, _settings(parsed)) if given else found
    if parsed.optimizer_check:
        raise ConfigError("--optimizer-check needs a factory that returns (model, optimizer)")
    if given:
        raise ConfigError("--optimizer, --lr, --weight-decay and --mu need a FACTORY of the model")
    return []


def _print_findings(findings: Iterable[Finding]) -> None:
    for finding in findings:
        _print(printable(str(finding)))


def _settings(parsed: argparse.Namespace) -> TrainingSettings:
    """Return the settings that the user has for the dense model."""
    known = {kind.lower(): kind for kind in torch.optim.__all__ if _is_optimizer(kind)}
    name = parsed.optimizer
    if name is not None and name.lower() not in known:
        raise ConfigError(f"--optimizer: expected one of {', '.join(known.values())}; got {name!r}")
    return TrainingSettings(
        optimizer=None if name is None else getattr(torch.optim, known[name.lower()]),
        lr=parsed.lr or 0.0,
        weight_decay=parsed.weight_decay or 0.0,
        mu=parsed.mu or 0.0,
    )


def _is_optimizer(name: str) -> bool:
    kind = getattr(torch.optim, name)
    return (
        isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
    )


def _export(parsed: argparse.Namespace) -> int:
    found = read_checkpoint(parsed.file)
    config = read_config(parsed) if config_options(parsed) else None
    model = None if parsed.model is None else model_from(parsed.model)
    if parsed.peft is not None:
        return _export_adapter(parsed, found, model, config)
    try:
        state, spec = dense_from(found, model, config)
    except FedParaError as error:
        raise type(error)(f"{parsed.file}: {error}") from error
    private = spec.private_keys
    whole = not private or not private.isdisjoint(found.tensors)
    save_dense(
        parsed.output,
        state,
        model="the exported model" if whole else "W1, the shared part (private part zero)",
        method=_method_of(found, config),
        owner_only=whole and bool(private),
    )
    size = readable_bytes(Path(parsed.output).stat().st_size)
    _print(f"{parsed.output}: dense state of {len(state)} tensors, {size}")
    if not whole:
        _print("The file holds no private factors: this is the shared model W1.")
    return 0


def _export_adapter(
    parsed: argparse.Namespace,
    found: Checkpoint,
    model: nn.Module | None,
    config: FedParaConfig | None,
) -> int:
    if model is None:
        raise ConfigError(
            "--peft needs --model FACTORY: the file does not say of which kind the layers are"
        )
    try:
        converted, other = adapter_from(found, model, config)
        private = not ModelSpec.of(converted).private_keys.isdisjoint(found.tensors)
        adapter = save_peft(converted, parsed.peft, base_model=parsed.base_model, private=private)
    except FedParaError as error:
        raise type(error)(f"{parsed.file}: {error}") from error
    kind, count = adapter.config["peft_type"], len(adapter.tensors)
    size = readable_bytes(sum(value.nbytes for value in adapter.tensors.values()))
    _print(f"{parsed.peft}: {kind} adapter of {count} tensors, {size}")
    if other:
        _print(
            f"The file's frozen weights differ from those of {parsed.model} ({other[0]!r}, "
            f"{len(other)} in all): the adapter belongs to the file's. Load it over the weights "
            f"that the run started from."
        )
    return 0


def _method_of(found: Checkpoint, config: FedParaConfig | None) -> str:
    chosen = config or found.config
    return "unknown" if chosen is None else chosen.method


def _inspect(parsed: argparse.Namespace) -> int:
    _print(inspect_file(parsed.file))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    output = Path(parsed.output)
    runs = read_runs(parsed.runs)
    if output.exists() and any(output.samefile(run.path) for run in runs):
        raise ConfigError(f"--output: {output} is one of the ledgers; choose another name")
    # The page is complete before the first byte is written: an error leaves an earlier page intact.
    page = render_page(runs, parsed.metric)
    output.write_text(page, encoding="utf-8")
    size = readable_bytes(output.stat().st_size)
    _print(printable(f"{output}: {', '.join(run.name for run in runs)}; {size}"))
    return 0


_HANDLERS: Mapping[str, Handler] = {
    "plan": _plan,
    "doctor": _doctor,
    "export": _export,
    "inspect": _inspect,
    "report": _report,
}
