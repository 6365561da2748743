"""The description that an adapter registers."""

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
    """A framework's adapter, described without an import of the framework.

    Attributes:
        name: the framework's name, such as ``flower``.
        module: import name of the adapter.
        requires: the requirement on the framework, such as ``flwr>=1.22``.
        lacks: missing features of the adapter, a sentence each.
        findings: returns what `fedpara doctor` says about an environment that has the framework; it
            must not import the framework.
    """

    name: str
    module: str
    requires: str
    lacks: tuple[str, ...] = ()
    findings: Callable[[], Iterable[Finding]] | None = None

    def load(self) -> ModuleType:
        """Import the adapter, and with it the framework."""
        return import_module(self.module)
