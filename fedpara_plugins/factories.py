"""The user's own code, named on the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
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
        return found if isinstance(found, nn.Module) else found()
    except Exception as error:  # the user's own code may raise anything
        raise ConfigError(f"{factory}: {type(error).__name__}: {error}{_where(error)}") from error


def _where(error: Exception) -> str:
    """File and line of the innermost frame outside of this file and of importlib."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and "importlib" not in file:
            place = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
