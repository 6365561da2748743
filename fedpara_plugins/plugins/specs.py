"""The hooks that a plugin may implement. Each calls ``register`` once per object."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedpara_plugins.plugins.markers import hookspec

if TYPE_CHECKING:
    from fedpara_plugins.factors.methods import Method
    from fedpara_plugins.layers import FactorisedLayer, LazyLayer
    from fedpara_plugins.plugins.adapter import Adapter
    from fedpara_plugins.stages.stage import Stage


@hookspec
def fedpara_register_layers(
    register: Callable[[type[FactorisedLayer] | LazyLayer], None],
) -> None:
    """Register kinds of factorised layer, one per dense class (`LazyLayer` for other packages)."""


@hookspec
def fedpara_register_methods(register: Callable[[Method], None]) -> None:
    """Register methods; users write their names in ``method = "..."``."""


@hookspec
def fedpara_register_stages(register: Callable[[Stage], None]) -> None:
    """Register codec stages; users write their names in ``codec = "a+b"``."""


@hookspec
def fedpara_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the adapter of a framework, without importing the framework."""
