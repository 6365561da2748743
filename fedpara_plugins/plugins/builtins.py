"""The plugin that registers the built-in parts, through the hooks that all plugins use."""

from __future__ import annotations

from collections.abc import Callable

from fedpara_plugins.factors.methods import BUILTIN_METHODS, Method
from fedpara_plugins.layers import BUILTIN_LAYERS, FactorisedLayer, LazyLayer
from fedpara_plugins.plugins.markers import hookimpl
from fedpara_plugins.stages import BUILTIN_STAGES, Stage


@hookimpl
def fedpara_register_layers(
    register: Callable[[type[FactorisedLayer] | LazyLayer], None],
) -> None:
    """Register the built-in kinds of layer."""
    for layer in BUILTIN_LAYERS:
        register(layer)


@hookimpl
def fedpara_register_methods(register: Callable[[Method], None]) -> None:
    """Register the built-in methods."""
    for method in BUILTIN_METHODS:
        register(method)


@hookimpl
def fedpara_register_stages(register: Callable[[Stage], None]) -> None:
    """Register the built-in codec stages."""
    for stage in BUILTIN_STAGES:
        register(stage)
