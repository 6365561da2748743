"""The registries, filled once from the built-in parts and the installed plugins."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import pluggy

from fedpara_plugins.errors import ConfigError, PluginError
from fedpara_plugins.plugins import specs
from fedpara_plugins.plugins.adapter import Adapter
from fedpara_plugins.plugins.markers import ENTRY_POINT_GROUP

if TYPE_CHECKING:
    from torch import nn

    from fedpara_plugins.factors.methods import Method
    from fedpara_plugins.layers import FactorisedLayer, LazyLayer
    from fedpara_plugins.stages.stage import Stage

__all__ = [
    "Adapter",
    "adapters",
    "layers",
    "leave_out_broken",
    "method_named",
    "methods",
    "reload",
    "stages",
]

DISABLE_VARIABLE = "FEDPARA_PLUGINS_DISABLE"
"""Comma-separated names of entry points to leave out, to find the plugin that misbehaves."""

BUILTINS = "builtins"
"""Name of the plugin with the built-in parts."""

_left_out: set[str] = set()
"""Names of plugins that `leave_out_broken` found."""


@dataclass
class _Registries:
    layers: dict[type[nn.Module], type[FactorisedLayer]] = field(default_factory=dict)
    lazy_layers: list[LazyLayer] = field(default_factory=list)
    methods: dict[str, Method] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)


def layers() -> Mapping[type[nn.Module], type[FactorisedLayer]]:
    """Return factorised layer classes by the dense class that they replace.

    Lazy kinds are included once somebody has imported the module of their dense class.
    """
    found = _registries()
    loadable = [lazy for lazy in found.lazy_layers if lazy.dense_module in sys.modules]
    for lazy in loadable:
        kind = lazy.load()
        found.layers[kind.dense_class] = kind
    found.lazy_layers = [lazy for lazy in found.lazy_layers if lazy not in loadable]
    return found.layers


def methods() -> Mapping[str, Method]:
    """Return methods by name, without ``none``, the absence of a method."""
    return _registries().methods


def stages() -> Mapping[str, Stage]:
    """Return codec stages by name."""
    return _registries().stages


def adapters() -> Mapping[str, Adapter]:
    """Return adapters by the framework's name."""
    return _registries().adapters


def method_named(name: str) -> Method | None:
    """Return the method with that name; None for ``none``.

    Raises:
        ConfigError: there is no such method; the message lists the known ones.
    """
    if name == "none":
        return None
    if name not in methods():
        known = ", ".join(["none", *methods()])
        raise ConfigError(f"option 'method': expected one of {known}; got {name!r}")
    return methods()[name]


def reload() -> None:
    """Forget all plugins; the next access to a registry loads them again, broken ones too."""
    _left_out.clear()
    _registries.cache_clear()


def leave_out_broken() -> dict[str, str]:
    """Leave out, in this process, the plugins that cannot be loaded.

    Only tools that inspect the installation call this. Elsewhere such a plugin is an error, since a
    run must not go on without a part that was installed for it.

    Returns:
        Reasons why plugins cannot be loaded, by plugin name.

    Raises:
        PluginError: the fault lies with no plugin that can be left out.
    """
    reasons: dict[str, str] = {}
    while True:
        try:
            _registries()
        except PluginError as error:
            if error.plugin is None or error.plugin in _left_out:
                raise
            reasons[error.plugin] = str(error)
            _left_out.add(error.plugin)
        else:
            return reasons


@lru_cache(maxsize=1)
def _registries() -> _Registries:
    hooks = _load_plugins().hook
    found = _Registries()
    kinds: dict[str, type[FactorisedLayer] | LazyLayer] = {}
    _collect(hooks.fedpara_register_layers, kinds, "layer kind", _dense_name)
    for kind in kinds.values():
        if isinstance(kind, type):
            found.layers[kind.dense_class] = kind
        else:
            found.lazy_layers.append(kind)
    _collect(hooks.fedpara_register_methods, found.methods, "method", attrgetter("name"))
    _collect(hooks.fedpara_register_stages, found.stages, "stage", attrgetter("name"))
    _collect(hooks.fedpara_register_adapters, found.adapters, "adapter", attrgetter("name"))
    return found


def _collect(
    hook: pluggy.HookCaller, into: dict[str, Any], what: str, name_of: Callable[[Any], str]
) -> None:
    """Let every plugin register its objects, one plugin after the other, to know their owners."""
    owners: dict[str, str] = {}
    for implementation in hook.get_hookimpls():
        plugin = implementation.plugin_name

        def register(registered: Any, plugin: str = plugin) -> None:
            name = name_of(registered)
            if name in into:
                raise PluginError(
                    f"{what} {name!r} is registered twice: by plugin {owners[name]!r} and by "
                    f"plugin {plugin!r}. Uninstall one of them, or name it in {DISABLE_VARIABLE}.",
                    plugin=plugin if plugin != BUILTINS else owners[name],
                )
            into[name], owners[name] = registered, plugin

        try:
            implementation.function(*[register for _ in implementation.argnames])
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {plugin!r} fails when it registers its {what}s: {_words(error)}. "
                f"{_remedy(plugin)}",
                plugin=plugin,
            ) from error


def _dense_name(kind: type[FactorisedLayer] | LazyLayer) -> str:
    """Return the dense class of a kind as ``package.module:Class``, as lazy kinds write it."""
    dense = kind.dense_class
    return dense if isinstance(dense, str) else f"{dense.__module__}:{dense.__qualname__}"


def _load_plugins() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(ENTRY_POINT_GROUP)
    manager.add_hookspecs(specs)
    manager.register(import_module("fedpara_plugins.plugins.builtins"), name=BUILTINS)
    disabled = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")}
    for point in entry_points(group=ENTRY_POINT_GROUP):
        known = manager.has_plugin(point.name)
        if not known and point.name not in disabled and point.name not in _left_out:
            _load(manager, point)
    return manager


def _load(manager: pluggy.PluginManager, point: EntryPoint) -> None:
    """Load one plugin, so that an error can name it."""
    try:
        manager.register(point.load(), name=point.name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(
            f"plugin {point.name!r}: {error}. Known hooks: "
            f"{', '.join(name for name in vars(specs) if name.startswith('fedpara_'))}. "
            f"{_remedy(point.name)}",
            plugin=point.name,
        ) from error
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"plugin {point.name!r} ({point.value}) cannot be imported: {_words(error)}. "
            f"{_remedy(point.name)}",
            plugin=point.name,
        ) from error


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _remedy(name: str) -> str:
    return f"Repair or uninstall it, or leave it out with {DISABLE_VARIABLE}={name}"
