"""The user's own code, named on the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fedpara_plugins.errors import ConfigError

__all__ = ["current_directory_importable", "model_from", "training_from"]


@contextmanager
def current_directory_importable() -> Iterator[None]:
    """Let factories be found in the current directory, as ``python -m`` would."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def model_from(factory: str) -> nn.Module:
    """Build a model as ``package.module:factory`` says; a module that stands there will do too.

    Raises:
        ConfigError: no such factory, it raises, or what it returns is no model.
    """
    made = _built(factory)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{factory}: expected a torch.nn.Module, got a {type(made).__name__}")
    return made


def training_from(factory: str) -> tuple[nn.Module, Optimizer]:
    """A model and its optimizer, from a factory that returns the two.

    Raises:
        ConfigError: no such factory, it raises, or it returns something else.
    """
    match made := _built(factory):
        case (nn.Module() as model, Optimizer() as optimizer):
            return model, optimizer
    raise ConfigError(
        f"{factory}: --optimizer-check expects a factory that returns (model, optimizer), got a "
        f"{type(made).__name__}"
    )


def _built(factory: str) -> object:
    module, colon, name = factory.partition(":")
    if not (module and colon and name):
        raise ConfigError(f"expected package.module:factory, got {factory!r}")
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if isinstance(found, nn.Module):
            return found
        _refuse_arguments(factory, found)
        return found()
    except ConfigError:
        raise
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{factory}: {type(error).__name__}: {error}{_where(error)}") from error


def _refuse_arguments(factory: str, found: Any) -> None:
    try:
        parameters = signature(found).parameters.values()
    except (TypeError, ValueError):  # no callable, or one that tells nothing: calling it will show
        return
    free = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    wanted = [p.name for p in parameters if p.default is Parameter.empty and p.kind not in free]
    if wanted:
        raise ConfigError(
            f"{factory} needs arguments ({', '.join(wanted)}), and here it is called without any: "
            f"name a function that needs none, such as net = functools.partial("
            f"{factory.rpartition(':')[2]}, {wanted[0]}=...) in a module of yours"
        )


def _where(error: Exception) -> str:
    """File and line of the innermost frame outside of this file and of importlib."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and "importlib" not in file:
            place = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
