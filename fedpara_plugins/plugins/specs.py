"""The hooks a plugin may implement. Each receives ``register`` and calls it once per thing."""

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
    """Register kinds of factorised layer, one per dense class; lazily, if of another package."""


@hookspec
def fedpara_register_methods(register: Callable[[Method], None]) -> None:
    """Register methods; the name is what users write in ``method = "..."``."""


@hookspec
def fedpara_register_stages(register: Callable[[Stage], None]) -> None:
    """Register codec stages; the name is what users write in ``codec = "a+b"``."""


@hookspec
def fedpara_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the adapter of a framework; must not import the framework."""
