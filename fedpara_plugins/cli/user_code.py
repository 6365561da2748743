"""Access to the user's code that is named on the command line."""

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
    """Let imports find modules in the current directory, as with ``python -m``."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def model_from(factory: str) -> nn.Module:
    """Return the model that a factory builds.

    Args:
        factory: ``package.module:factory``; it may also name a `torch.nn.Module` itself.

    Raises:
        ConfigError: there is no such factory, it raises, or it does not return a model.
    """
    made = _call_factory(factory)
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{factory}: expected a torch.nn.Module, got a {type(made).__name__}")
    return made


def training_from(factory: str) -> tuple[nn.Module, Optimizer]:
    """Return the model and the optimizer that a factory builds.

    Args:
        factory: ``package.module:factory``.

    Raises:
        ConfigError: there is no such factory, it raises, or it returns something else.
    """
    match made := _call_factory(factory):
        case (nn.Module() as model, Optimizer() as optimizer):
            return model, optimizer
    raise ConfigError(
        f"{factory}: --optimizer-check expects a factory that returns (model, optimizer), got a "
        f"{type(made).__name__}"
    )


def _call_factory(factory: str) -> object:
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
        raise ConfigError(
            f"{factory}: {type(error).__name__}: {error}{_location(error)}"
        ) from error


def _refuse_arguments(factory: str, found: Any) -> None:
    try:
        parameters = signature(found).parameters.values()
    except (TypeError, ValueError):  # not callable, or without a signature: the call will tell
        return
    free = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    wanted = [p.name for p in parameters if p.default is Parameter.empty and p.kind not in free]
    if wanted:
        raise ConfigError(
            f"{factory} needs arguments ({', '.join(wanted)}), but it is called without any: "
            f"name a function that needs none, such as net = functools.partial("
            f"{factory.rpartition(':')[2]}, {wanted[0]}=...) in a module of yours"
        )


def _location(error: Exception) -> str:
    """Return file and line of the innermost frame outside of this file and importlib."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if file != __file__ and "importlib" not in file:
            place = f" ({file}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return place
