"""The adapter's registration with pluggy, which imports no Flower."""

from __future__ import annotations

from collections.abc import Callable

from fedpara_plugins.plugins import Adapter, hookimpl

ADAPTER = Adapter(name="flower", module="fedpara_plugins_flower", requires="flwr>=1.22")


@hookimpl
def fedpara_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the adapter."""
    register(ADAPTER)
