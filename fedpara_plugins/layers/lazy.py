"""Kinds for the layers of packages that this package must not import."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from fedpara_plugins.errors import PluginError

if TYPE_CHECKING:
    from fedpara_plugins.layers.base import FactorisedLayer

__all__ = ["LazyLayer"]


@dataclass(frozen=True, kw_only=True)
class LazyLayer:
    """The place of a kind that is loaded when the dense layer's package has been imported.

    It is registered like a kind. Until somebody imports the dense class's module, no model can hold
    such a layer and the kind is not needed.

    Attributes:
        dense_class: the dense class as ``package.module:Class``, with the module that defines it.
        kind: its `FactorisedLayer`, written the same way. Its module may import the dense class's
            module.
    """

    dense_class: str
    kind: str

    @property
    def dense_module(self) -> str:
        """The module whose import makes the kind necessary."""
        return self.dense_class.partition(":")[0]

    def load(self) -> type[FactorisedLayer]:
        """Import and return the kind.

        Raises:
            PluginError: it cannot be imported, or it replaces another dense class.
        """
        module, _, name = self.kind.partition(":")
        try:
            kind: type[FactorisedLayer] = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"layer kind {self.kind} for {self.dense_class} cannot be loaded: {error}. Install "
                f"a version of {module.partition('.')[0]} that suits the installed "
                f"{self.dense_module.partition('.')[0]}."
            ) from error
        found = f"{kind.dense_class.__module__}:{kind.dense_class.__qualname__}"
        if found != self.dense_class:
            raise PluginError(
                f"layer kind {self.kind} was registered for {self.dense_class}, but replaces "
                f"{found}: correct the registration"
            )
        return kind
