"""How the user's ``Net()`` comes to build the run's model."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar, cast

from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import nn

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.messages.snippets import ADD_MOD, ADD_WRAPPER
from fedpara_plugins_flower.run import Run, active_run

__all__ = ["factorise_class", "factorised", "plain_model_hint"]

P = ParamSpec("P")
M = TypeVar("M", bound=nn.Module)

MARK = "_fedpara_factorised"
"""In the namespace of a class that was changed in place."""


def factorised(factory: Callable[P, M]) -> Callable[P, M]:
    """Wrap a model class or factory: what it returns is converted as the active run says.

    Use it right after the imports, ``Net = fedpara.factorised(Net)``: every ``Net()`` of the file,
    in helper functions and in an ``evaluate_fn`` too, then builds the run's model. Or use it once
    as a decorator where the class is defined, ``@fedpara.factorised``, for every file that builds
    the model. With method ``none`` the model is returned as it is, and so it is on clients
    that train dense (option ``local``).

    Args:
        factory: the model's class, or any function that returns a new model. A class is changed in
            place if it is defined in the file that calls this: its own methods may refer to it by
            its name, as in ``super(Net, self)``.

    Returns:
        A function with the same arguments (or the class). It raises `ConfigError` when it is called
        outside a run, where the config is not known. ``Net.__wrapped__()`` builds the plain model.
    """
    if isinstance(factory, type):
        caller = sys._getframe(1).f_globals.get("__name__")
        if MARK in vars(factory) or factory.__module__ == caller:
            return cast(Callable[P, M], factorise_class(factory))

    @functools.wraps(factory, updated=())
    def build(*args: P.args, **kwargs: P.kwargs) -> M:
        run = _run_for(getattr(factory, "__name__", "the model"))
        return run.converted(factory(*args, **kwargs))

    return build


def factorise_class(model_class: type[M]) -> type[M]:
    """Change a class in place, so that calling it builds the run's model, whoever imported it.

    Subclasses are not affected, nor are copies and unpickled models, which exist already.
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
    """What to change, if an error comes from loading the run's state into the model of before.

    Args:
        error: of the user's code.
        run: that was going on.
    """
    text = str(error)
    specs = [*run.specs.values(), *([run.expected] if run.expected else [])]
    # A converted model has factors in the place of these names, and would not miss them.
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
    if run is None:
        where = _app_that_calls()
        plain = f"For the plain model call the original class, {name}.__wrapped__()"
        if where is None:
            raise ConfigError(
                f"fedpara: {name}() was called outside a run of the plugin, where its config is "
                f"not known. Build the model inside the app's functions. {plain}"
            )
        side, line = where
        raise ConfigError(
            f"fedpara: this {side} runs without the plugin, so that {name}() does not know the "
            f"run's config. Add to the {side}: {line}. {plain}"
        )
    return run


def _app_that_calls() -> tuple[str, str] | None:
    """The side whose app the caller runs in, and the line that it lacks; None outside of apps."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        app = frame.f_locals.get("self")
        if isinstance(app, ClientApp):
            return "client", ADD_MOD
        if isinstance(app, ServerApp):
            return "server", ADD_WRAPPER
        frame = frame.f_back
    return None
