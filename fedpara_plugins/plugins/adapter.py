"""What an adapter registers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedpara_plugins.support.findings import Finding


@dataclass(frozen=True)
class Adapter:
    """What is known of a framework's adapter without importing the framework.

    Attributes:
        name: of the framework, such as ``flower``.
        module: import name of the adapter.
        requires: the requirement on the framework, such as ``flwr>=1.22``.
        lacks: what the adapter cannot do yet, a sentence each.
        findings: what `fedpara doctor` says of an environment that has the framework; it must not
            import the framework.
    """

    name: str
    module: str
    requires: str
    lacks: tuple[str, ...] = ()
    findings: Callable[[], Iterable[Finding]] | None = None

    def load(self) -> ModuleType:
        """Import the adapter (and with it, as far as it is used, the framework)."""
        return import_module(self.module)
