"""Plugins: layer kinds, methods, codec stages and framework adapters, found through pluggy.

A distribution is a plugin if it names a module in the entry-point group ``fedpara_plugins`` and
marks functions of that module with `hookimpl`::

    from fedpara_plugins import hookimpl

    @hookimpl
    def fedpara_register_layers(register):
        register(MyFactorisedLayer)

The built-in parts register through the same hooks. Plugins are loaded at the first access to a
registry, never at import, and are not consulted per tensor or step.

A plugin that cannot be loaded is an error that names it. ``FEDPARA_PLUGINS_DISABLE=name,other``, in
the environment of every process that uses the core, leaves plugins out by the names of their entry
points; ``fedpara doctor`` lists these names.

The room may import ``layers``, ``stages`` and what stands below them. It offers the registries, and
the classes that plugins register or derive from.
"""

from __future__ import annotations

from fedpara_plugins.factors.methods import Method
from fedpara_plugins.factors.plan import WeightSlot
from fedpara_plugins.layers import FactorisedLayer, LazyLayer, composed
from fedpara_plugins.plugins.adapter import Adapter
from fedpara_plugins.plugins.markers import ENTRY_POINT_GROUP, hookimpl
from fedpara_plugins.plugins.registry import (
    adapters,
    layers,
    leave_out_broken,
    method_named,
    methods,
    reload,
    stages,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "Adapter",
    "FactorisedLayer",
    "LazyLayer",
    "Method",
    "WeightSlot",
    "adapters",
    "composed",
    "hookimpl",
    "layers",
    "leave_out_broken",
    "method_named",
    "methods",
    "reload",
    "stages",
]
