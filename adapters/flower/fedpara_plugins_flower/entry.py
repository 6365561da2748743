"""Apps that run the user's apps with the plugin: named in pyproject.toml, without a Python edit.

    [tool.flwr.app.components]
    serverapp = "fedpara_plugins_flower.entry:server_app"
    clientapp = "fedpara_plugins_flower.entry:client_app"

    [tool.flwr.app.config.fedpara]
    serverapp = "my_app.server_app:app"  # as it stood in components before
    clientapp = "my_app.client_app:app"
    model = "my_app.task:Net"            # or several, joined by commas
    method = "fedpara"

The user's app is imported when a run begins, since these options are not known before. Before the
app's own files are imported, the model's class is changed in place, for every file that imports it.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedpara_plugins import ConfigError
from fedpara_plugins_flower.client.mod import client_mod, client_mod_with
from fedpara_plugins_flower.factories import factorise_class, factorised
from fedpara_plugins_flower.seams import mods_of
from fedpara_plugins_flower.server.app import server_app as with_plugin
from fedpara_plugins_flower.settings import PREFIX, FlowerSettings

__all__ = ["client_app", "server_app"]


class _ServerApp(ServerApp):
    """Runs the ServerApp that the run's config names."""

    def __call__(self, grid: Grid, context: Context) -> None:
        with_plugin(_configured_app(context, "serverapp", ServerApp))(grid, context)


class _ClientApp(ClientApp):
    """Runs the ClientApp that the run's config names."""

    def __call__(self, message: Message, context: Context) -> Message:
        app = _configured_app(context, "clientapp", ClientApp)
        if _has_mod(app):
            reply: Message = app(message, context)
            return reply
        return client_mod(message, context, app)


server_app = _ServerApp()
client_app = _ClientApp()


def _configured_app(context: Context, option: str, kind: type[Any]) -> Any:
    """Return the app that an option names, after its models have been factorised.

    Raises:
        ConfigError: if the option is missing, or its value cannot be loaded or is of another kind.
    """
    config = context.run_config
    names = [name.strip() for name in str(config.get(f"{PREFIX}model", "")).split(",")]
    for name in filter(None, names):
        _factorise(name)
    settings = FlowerSettings.from_run_config(config)
    if not any(names) and settings.active and settings.config.method != "none":
        raise ConfigError(_missing("model", "my_app.task:Net", config))
    if not config.get(PREFIX + option):
        example = f"my_app.{option.removesuffix('app')}_app:app"
        raise ConfigError(_missing(option, example, config))
    app = _load(option, str(config[PREFIX + option]))
    if not isinstance(app, kind):
        raise ConfigError(
            f"fedpara: option {option!r} names a {type(app).__name__}, expected a {kind.__name__}"
        )
    return app


def _factorise(name: str) -> None:
    module, _, attribute = name.partition(":")
    model = _load("model", name)
    if isinstance(model, type):
        factorise_class(model)
    elif not hasattr(model, "__wrapped__"):
        # The app's files, which import the function from its module, are imported after this.
        setattr(import_module(module), attribute, factorised(model))


def _load(option: str, name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"fedpara: option {option!r}: expected module:name, got {name!r}")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"fedpara: option {option!r}: cannot load {name!r}: {error}") from error


def _missing(option: str, example: str, config: Mapping[str, Any]) -> str:
    named = sorted(key for key in config if key.startswith(PREFIX))
    return (
        f"fedpara: components names fedpara_plugins_flower.entry, so the section "
        f'[tool.flwr.app.config.fedpara] must name the app\'s own: {option} = "{example}". It has '
        f"{', '.join(named) or 'nothing'}"
    )


def _has_mod(app: ClientApp) -> bool:
    """Return whether the app has the plugin's mod already."""
    with_options = getattr(client_mod_with(), "func", None)
    return any(
        mod is client_mod or getattr(mod, "func", None) is with_options for mod in mods_of(app)
    )
