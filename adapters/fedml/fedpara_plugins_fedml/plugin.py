"""The adapter's registration with pluggy, which imports no FedML."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fedpara_plugins.plugins import Adapter, hookimpl

if TYPE_CHECKING:
    from fedpara_plugins.support import Finding


def _findings() -> Iterable[Finding]:
    from fedpara_plugins_fedml.environment import findings  # it imports the core's own

    return findings()


ADAPTER = Adapter(
    name="fedml",
    module="fedpara_plugins_fedml",
    requires="fedml==0.9.6",
    findings=_findings,
)


@hookimpl
def fedpara_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the adapter."""
    register(ADAPTER)
