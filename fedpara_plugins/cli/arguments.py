"""The arguments of the command ``fedpara``, which include all options of the config."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NoReturn, TypeAlias

from fedpara_plugins._version import __version__
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError

__all__ = ["Handler", "config_options", "parse_arguments", "parse_count", "read_config"]

Handler: TypeAlias = Callable[[argparse.Namespace], int]
"""Runs a sub-command with its parsed arguments, and returns the exit code."""

_OPTION = "option_"
"""Prefix of the arguments that are fields of `FedParaConfig`."""

_FACTORY = "package.module:factory, called without arguments; also found in the current directory"


def parse_arguments(
    words: Sequence[str] | None, handlers: Mapping[str, Handler]
) -> argparse.Namespace:
    """Parse the command line.

    Args:
        words: the words after ``fedpara``; the process's own if None.
        handlers: of the sub-commands, by name.

    Returns:
        The arguments; ``run`` is the handler.

    Raises:
        ConfigError: a word is unknown, missing or malformed.
    """
    parsed, unknown = _parser(handlers).parse_known_args(words)
    if unknown:
        known = re.findall(r"^ +(?:-.*, )?(--[a-z-]+)", parsed.parser.format_help(), re.MULTILINE)
        near = get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        parsed.parser.error(f"unknown argument {unknown[0]!r}{hint}")
    return parsed


def config_options(parsed: argparse.Namespace) -> dict[str, str]:
    """Return the options of the config that were given, by name."""
    return {
        key.removeprefix(_OPTION): value
        for key, value in vars(parsed).items()
        if key.startswith(_OPTION) and value is not None
    }


def read_config(parsed: argparse.Namespace) -> FedParaConfig:
    """Return the config that the arguments describe; its method is ``fedpara`` if none was given.

    Raises:
        ConfigError: a value is malformed or out of range.
    """
    return FedParaConfig.from_mapping({"method": "fedpara", **config_options(parsed)})


def parse_count(flag: str, text: str) -> int:
    """Return the value of a flag that takes a whole number of at least 1.

    Raises:
        ConfigError: the text is anything else.
    """
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{flag}: expected a whole number of at least 1, got {text!r}")
    return int(text)


class _Parser(argparse.ArgumentParser):
    """A parser that raises its errors, so that they are printed as one line like all others."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parser(handlers: Mapping[str, Handler]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fedpara", description="FedPara for existing federated projects.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fedpara-plugins {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (text, add_arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        command.set_defaults(run=handlers[name], parser=command)
        add_arguments(command)
    return parser


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FACTORY", help=_FACTORY)
    parser.add_argument("--uplink", metavar="RATE", help="client to server, such as 1Mbit")
    parser.add_argument("--downlink", metavar="RATE", help="server to client, such as 10Mbit")
    parser.add_argument(
        "--target-bytes",
        metavar="SIZE",
        help="choose the largest gamma with which a message fits this size, such as 300kB",
    )
    parser.add_argument(
        "--clients", metavar="N", default="1", help="clients that take part in a round"
    )
    parser.add_argument("--rounds", metavar="N", default="1", help="rounds of the run")
    parser.add_argument(
        "--input",
        metavar="SHAPE",
        action="append",
        default=[],
        help="shape of a batch, such as 64x3x32x32 (16x80:1000 for tokens below 1000): also "
        "predict the time of a training step; repeat it for each input of the model",
    )
    _add_config_options(parser)


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="FACTORY", nargs="?", help=_FACTORY)
    parser.add_argument(
        "--optimizer-check",
        action="store_true",
        help="FACTORY returns (model, optimizer): check that the optimizer trains the model",
    )
    parser.add_argument(
        "--optimizer",
        metavar="NAME",
        help="optimizer in torch.optim that trains the dense model now, such as SGD",
    )
    parser.add_argument("--lr", type=float, help="its learning rate")
    parser.add_argument("--weight-decay", type=float, help="its weight decay")
    parser.add_argument("--mu", type=float, help="mu of FedProx's proximal term")
    _add_config_options(parser)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FACTORS", help=".safetensors, or a state dict (.pt)")
    into = parser.add_mutually_exclusive_group(required=True)
    into.add_argument("-o", "--output", metavar="FILE", help="the dense model, .safetensors")
    into.add_argument(
        "--peft",
        metavar="FOLDER",
        help="an adapter for PeftModel.from_pretrained, of a model with base='frozen'",
    )
    parser.add_argument(
        "--model",
        metavar="FACTORY",
        help=f"{_FACTORY}; needed for --peft, and if the file has no description",
    )
    parser.add_argument(
        "--base-model", metavar="NAME", help="for --peft: name or path of the pretrained model"
    )
    _add_config_options(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="a ledger, or name=ledger for the legend"
    )
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help=".html")
    parser.add_argument(
        "--metric",
        metavar="NAME",
        help="metric to plot over bytes and rounds, instead of accuracies",
    )


_COMMANDS: Mapping[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "plan": ("predict the bytes and the time of a run", _add_plan),
    "doctor": ("check the installation, and a model", _add_doctor),
    "export": ("turn a checkpoint of factors into an ordinary dense one", _add_export),
    "inspect": ("describe a payload, checkpoint or ledger", _add_inspect),
    "report": ("plot the ledgers of several runs on one page", _add_report),
}


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each option of the config, with its text from the config's docstring."""
    group = parser.add_argument_group("options of the run, as in the config")
    texts = _option_texts()
    for field in fields(FedParaConfig):
        takes: dict[str, Any] = {"metavar": "VALUE"}
        if field.default is False:
            takes = {"action": "store_const", "const": "true"}
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=_OPTION + field.name,
            help=texts.get(field.name, "").replace("%", "%%"),
            **takes,
        )


def _option_texts() -> dict[str, str]:
    section = (FedParaConfig.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}
