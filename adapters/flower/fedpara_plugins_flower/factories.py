"""Wrappers of the user's model class or factory, which then builds the active run's model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

from flwr.clientapp import ClientApp
from torch import nn

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.messages.snippets import ADD_MOD, ADD_WRAPPER
from fedpara_plugins_flower.run import Run, active_run
from fedpara_plugins_flower.seams import running_app

__all__ = ["factorise_class", "factorised", "plain_model_hint"]

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")

MARK = "_fedpara_factorised"
"""Attribute of a class that was changed in place."""


def factorised(factory: Callable[P, T]) -> Callable[P, T]:
    """Wrap a model class or factory, so that its models are converted as the active run says.

    Use it right after the imports, ``Net = fedpara.factorised(Net)``: every ``Net()`` of the file
    then builds the run's model, in helper functions and in an ``evaluate_fn`` too. Or use it once
    as a decorator where the class is defined, ``@fedpara.factorised``, for every file that builds
    the model. With method ``none``, and on clients that train dense (option ``local``), the model
    is returned unchanged.

    Args:
        factory: the model's class, or any function that returns a new model, or several in a tuple
            or list. A class is changed in place if it is defined in the file that calls this
            function: its methods may refer to it by its name, as in ``super(Net, self)``.

    Returns:
        A function with the same arguments (or the class). It raises `ConfigError` if it is called
        outside a run, where the config is not known. ``Net.__wrapped__()`` builds the plain model.
    """
    if isinstance(factory, type):
        caller = sys._getframe(1).f_globals.get("__name__")
        if MARK in vars(factory) or factory.__module__ == caller:
            return cast(Callable[P, T], factorise_class(factory))

    @functools.wraps(factory, updated=())
    def build(*args: P.args, **kwargs: P.kwargs) -> T:
        run = _run_for(getattr(factory, "__name__", "the model"))
        return cast(T, _converted(run, factory(*args, **kwargs)))

    return build


def _converted(run: Run, built: Any) -> Any:
    """Convert the model, or every model of a tuple or list, that a factory has returned."""
    if isinstance(built, tuple | list):
        beside = sum(isinstance(each, nn.Module) for each in built) > 1
        found = [
            run.converted(each, beside=beside) if isinstance(each, nn.Module) else each
            for each in built
        ]
        run.check_beside()
        if any(isinstance(each, nn.Module) for each in built):
            # A named tuple takes its fields one by one.
            kind: Any = type(built)
            return kind(*found) if hasattr(built, "_fields") else kind(found)
    return run.converted(built)


def factorise_class(model_class: type[M]) -> type[M]:
    """Change a class in place, so that calling it builds the run's model, whoever imported it.

    Subclasses are not affected. Neither are copies and unpickled models: no call builds them.
    """
    if MARK in vars(model_class):
        return model_class
    original = cast(Callable[..., None], model_class.__init__)

    @functools.wraps(original)
    def initialise(self: M, *args: Any, **kwargs: Any) -> None:
        if type(self) is not model_class:
            original(self, *args, **kwargs)
            return
        run = _run_for(model_class.__name__)
        original(self, *args, **kwargs)
        if run.converted(self) is not self:
            raise ConfigError(
                f"fedpara: {model_class.__name__} is itself a layer that would be replaced, so its "
                f"class cannot be changed in place. Write Net = fedpara.factorised(Net) after the "
                f"imports of each file that builds the model"
            )

    def plain(*args: Any, **kwargs: Any) -> M:
        model = model_class.__new__(model_class)
        original(model, *args, **kwargs)
        return model

    changed: Any = model_class
    changed.__init__ = initialise
    changed.__wrapped__ = staticmethod(plain)
    setattr(changed, MARK, True)
    return model_class


def plain_model_hint(error: Exception, run: Run) -> str | None:
    """Return what to change in the app if an error comes from loading the run's state; else None.

    Args:
        error: raised by the user's code, possibly by a plain model that cannot load factors.
        run: the run that was active.
    """
    text = str(error)
    specs = [*run.specs.values(), *run.expected]
    # A converted model has factors instead of these names, so its error would not list them.
    if (
        run.trains_dense
        or "loading state_dict" not in text
        or not any(w in text for s in specs for w in s.weights)
    ):
        return None
    return (
        f"fedpara: a file of the app builds the plain model, which cannot load the run's state. "
        f"Put @fedpara.factorised on the line above the model's class, where it is defined: it "
        f"then serves every file. The error was: {text[:300]}"
    )


def _run_for(name: str) -> Run:
    run = active_run()
    if run is not None:
        return run
    plain = f"For the plain model call the original class, {name}.__wrapped__()"
    app = running_app()
    if app is None:
        raise ConfigError(
            f"fedpara: {name}() was called outside a run of the plugin, where its config is "
            f"not known. Build the model inside the app's functions. {plain}"
        )
    side, line = ("client", ADD_MOD) if isinstance(app, ClientApp) else ("server", ADD_WRAPPER)
    raise ConfigError(
        f"fedpara: this {side} runs without the plugin, so that {name}() does not know the "
        f"run's config. Add to the {side}: {line}. {plain}"
    )
