"""The command ``fedpara``: plan, doctor, export, inspect, report.

Exit codes: 0 done; 1 a model or file is refused, or the doctor found something that needs
attention; 2 the command line cannot be used. Errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import torch

from fedpara_plugins._version import __version__
from fedpara_plugins.cli.doctor import check_environment, check_model, check_training
from fedpara_plugins.cli.export import dense_from
from fedpara_plugins.cli.inspect_file import inspect_file
from fedpara_plugins.cli.plan import Link, choose_gamma, plan_traffic
from fedpara_plugins.cli.step_cost import parse_input, step_cost
from fedpara_plugins.cli.training_settings import Settings, check_settings, settings_of
from fedpara_plugins.cli.user_code import current_directory_importable, model_from, training_from
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, FedParaError
from fedpara_plugins.ledger.page import read_runs, render_page
from fedpara_plugins.models.checkpoint_files import Checkpoint, read_checkpoint
from fedpara_plugins.models.checkpoints import save_dense
from fedpara_plugins.support.findings import Finding
from fedpara_plugins.support.units import parse_rate, parse_size, readable_bytes
from fedpara_plugins.text import printable

__all__ = ["main"]

CARRIED = ("optimizer", "lr", "weight_decay", "mu")
"""Settings of the user's training, whose meaning on factors the doctor states."""

OPTION = "option_"
"""Prefix of the arguments that are fields of `FedParaConfig`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the words after ``fedpara``; the process's own if None.

    Returns:
        The exit code.
    """
    try:
        with current_directory_importable():
            parsed = _parse(arguments)
            return int(parsed.run(parsed))
    except BrokenPipeError:
        # The reader (`| head`) has gone. Nothing is left to say, not even when Python exits.
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


def _say(text: object) -> None:
    sys.stdout.write(f"{text}\n")


# Commands


def _plan(parsed: argparse.Namespace) -> int:
    config = _config(parsed)
    link = Link(
        up=None if parsed.uplink is None else parse_rate(parsed.uplink),
        down=None if parsed.downlink is None else parse_rate(parsed.downlink),
    )
    target = None if parsed.target_bytes is None else parse_size(parsed.target_bytes)
    clients, rounds = _whole("--clients", parsed.clients), _whole("--rounds", parsed.rounds)
    inputs = [parse_input(text) for text in parsed.input]
    model = model_from(parsed.model)
    if target is not None:
        if "gamma" in _given(parsed):
            raise ConfigError("--target-bytes chooses gamma: leave out --gamma")
        config = choose_gamma(model, config, target=target)
    step = step_cost(model, config, inputs) if inputs else None  # refused before a word is said
    if target is not None:
        _say(f"gamma {config.gamma:g} is the largest that fits {target:,} bytes\n")
    _say(plan_traffic(model, config, link=link, clients=clients, rounds=rounds))
    if step is not None:
        _say(f"\n{step}")
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    config = _config(parsed)
    findings = check_environment()
    try:
        findings += _about_training(parsed, config)
    except FedParaError:
        _say_all(finding for finding in findings if finding.level == "attention")  # it may be why
        raise
    _say_all(findings)
    bad = sum(finding.level == "attention" for finding in findings)
    _say(f"{bad} of {len(findings)} findings need attention" if bad else "nothing needs attention")
    return 1 if bad else 0


def _about_training(parsed: argparse.Namespace, config: FedParaConfig) -> list[Finding]:
    """The user's model, optimizer and settings, as far as they are given."""
    if parsed.model is not None and parsed.optimizer_check:
        model, optimizer = training_from(parsed.model)
        return [
            *check_training(model, optimizer),
            *check_settings(model, settings_of(optimizer)),
        ]
    carried = any(vars(parsed)[name] is not None for name in CARRIED)
    if parsed.model is not None:
        model = model_from(parsed.model)
        found = check_model(model, config)
        return found + check_settings(model, _carried(parsed)) if carried else found
    if parsed.optimizer_check:
        raise ConfigError("--optimizer-check needs a factory that returns (model, optimizer)")
    if carried:
        raise ConfigError("--optimizer, --lr, --weight-decay and --mu need a FACTORY of the model")
    return []


def _say_all(findings: Iterable[Finding]) -> None:
    for finding in findings:
        _say(printable(str(finding)))


def _carried(parsed: argparse.Namespace) -> Settings:
    """The settings that the user has for the dense model."""
    known = {kind.lower(): kind for kind in torch.optim.__all__ if _is_optimizer(kind)}
    name = parsed.optimizer
    if name is not None and name.lower() not in known:
        raise ConfigError(f"--optimizer: expected one of {', '.join(known.values())}; got {name!r}")
    return Settings(
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
    config = _config(parsed) if _given(parsed) else None
    model = None if parsed.model is None else model_from(parsed.model)
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
    )
    size = readable_bytes(Path(parsed.output).stat().st_size)
    _say(f"{parsed.output}: dense state of {len(state)} tensors, {size}")
    if not whole:
        _say("The file holds no private factors: this is the shared model W1.")
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    _say(inspect_file(parsed.file))
    return 0


def _report(parsed: argparse.Namespace) -> int:
    output = Path(parsed.output)
    runs = read_runs(parsed.runs)
    if output.exists() and any(output.samefile(run.path) for run in runs):
        raise ConfigError(f"--output: {output} is one of the ledgers; choose another name")
    # Whole before the first byte is written: an error leaves an earlier page as it was.
    page = render_page(runs, parsed.metric)
    output.write_text(page, encoding="utf-8")
    size = readable_bytes(output.stat().st_size)
    _say(printable(f"{output}: {', '.join(run.name for run in runs)}; {size}"))
    return 0


def _method_of(found: Checkpoint, config: FedParaConfig | None) -> str:
    chosen = config or found.config
    return "unknown" if chosen is None else chosen.method


# Arguments


class _Parser(argparse.ArgumentParser):
    """Errors are raised, so that they end in one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parsed, unknown = _parser().parse_known_args(arguments)
    if unknown:
        known = [flag for flag in parsed.parser._option_string_actions if flag.startswith("--")]
        near = get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parsed.parser.error(f"unknown argument {unknown[0]!r}{hint}")
    return parsed


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedpara", description="FedPara for existing federated projects.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fedpara-plugins {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    factory = "package.module:factory; called without arguments, from the current directory too"

    plan = _command(commands, "plan", _plan, "what a run costs before there is one")
    plan.add_argument("model", metavar="FACTORY", help=factory)
    plan.add_argument("--uplink", metavar="RATE", help="client to server, such as 1Mbit")
    plan.add_argument("--downlink", metavar="RATE", help="server to client, such as 10Mbit")
    plan.add_argument("--target-bytes", metavar="SIZE", help="choose gamma for this, as in 300kB")
    plan.add_argument("--clients", metavar="N", default="1", help="that take part in a round")
    plan.add_argument("--rounds", metavar="N", default="1", help="of the run")
    plan.add_argument(
        "--input",
        metavar="SHAPE",
        action="append",
        default=[],
        help="of a batch, as in 64x3x32x32 (16x80:1000: tokens below 1000): also predict what a "
        "training step costs; once for each input of the model",
    )
    _add_options(plan)

    doctor = _command(commands, "doctor", _doctor, "check the installation, and a model")
    doctor.add_argument("model", metavar="FACTORY", nargs="?", help=factory)
    doctor.add_argument(
        "--optimizer-check",
        action="store_true",
        help="FACTORY returns (model, optimizer) as trained: does the one train the other?",
    )
    doctor.add_argument("--optimizer", metavar="NAME", help="of torch.optim, such as SGD, that")
    doctor.add_argument("--lr", type=float, help="with this learning rate,")
    doctor.add_argument("--weight-decay", type=float, help="this weight decay, and")
    doctor.add_argument("--mu", type=float, help="this mu of FedProx trains the dense model now")
    _add_options(doctor)

    export = _command(commands, "export", _export, "factors in, an ordinary dense checkpoint out")
    export.add_argument("file", metavar="FACTORS", help=".safetensors, or a state dict (.pt)")
    export.add_argument("-o", "--output", metavar="FILE", required=True, help=".safetensors")
    export.add_argument(
        "--model", metavar="FACTORY", help=f"{factory}; needed if the file does not say"
    )
    _add_options(export)

    inspect = _command(commands, "inspect", _inspect, "what is in a payload, checkpoint or ledger")
    inspect.add_argument("file", metavar="FILE")

    report = _command(commands, "report", _report, "ledgers of runs as one page with plots")
    report.add_argument(
        "runs", metavar="RUN", nargs="+", help="a ledger, or name=ledger for the legend"
    )
    report.add_argument("-o", "--output", metavar="FILE", required=True, help=".html")
    report.add_argument(
        "--metric", metavar="NAME", help="what to plot over bytes and rounds, instead of accuracies"
    )
    return parser


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    """One flag for each option of the config, with the words of its documentation."""
    group = parser.add_argument_group("options of the run, as in the config")
    texts = _option_texts()
    for field in fields(FedParaConfig):
        takes: dict[str, Any] = {"metavar": "VALUE"}
        if field.default is False:
            takes = {"action": "store_const", "const": "true"}
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=OPTION + field.name,
            help=texts.get(field.name, "").replace("%", "%%"),
            **takes,
        )


def _option_texts() -> dict[str, str]:
    section = (FedParaConfig.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _given(parsed: argparse.Namespace) -> dict[str, str]:
    return {
        key.removeprefix(OPTION): value
        for key, value in vars(parsed).items()
        if key.startswith(OPTION) and value is not None
    }


def _config(parsed: argparse.Namespace) -> FedParaConfig:
    return FedParaConfig.from_mapping({"method": "fedpara", **_given(parsed)})


def _whole(flag: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{flag}: expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
