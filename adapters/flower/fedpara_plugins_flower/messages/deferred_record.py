"""A record of arrays that are made when the app first looks at them."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView

from flwr.app import Array, ArrayRecord

from fedpara_plugins_flower.messages.sixteen_bits import TypedRecord

__all__ = ["DeferredRecord"]


class DeferredRecord(TypedRecord):
    """A record that is empty until it is read, in whatever way.

    How much a message may make a client allocate depends on the client's model, and apps build it
    in the function that handles the message, before they read the arrays.

    Args:
        make: returns the arrays; called once. Its errors reach whoever reads the record.
    """

    __qualname__ = ArrayRecord.__qualname__  # an app may answer with it, or keep it

    def __init__(self, make: Callable[[], Mapping[str, Array]]) -> None:
        super().__init__()
        self.__dict__["_make"] = make

    def _fill(self) -> None:
        make = self.__dict__["_make"]
        if make is None:
            return
        arrays = make()
        self.__dict__["_make"] = None
        for name, array in arrays.items():
            super().__setitem__(name, array)

    def __getitem__(self, key: str) -> Array:
        self._fill()
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Array) -> None:
        self._fill()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self._fill()
        super().__delitem__(key)

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return super().__iter__()

    def __len__(self) -> int:
        self._fill()
        return super().__len__()

    def __contains__(self, key: object) -> bool:
        self._fill()
        return super().__contains__(key)

    def __eq__(self, other: object) -> bool:
        self._fill()
        if isinstance(other, DeferredRecord):
            other._fill()
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        self._fill()
        return super().__repr__()

    def keys(self) -> KeysView[str]:
        """Return the names."""
        self._fill()
        return super().keys()

    def values(self) -> ValuesView[Array]:
        """Return the arrays."""
        self._fill()
        return super().values()

    def items(self) -> ItemsView[str, Array]:
        """Return names and arrays."""
        self._fill()
        return super().items()

    def copy(self) -> DeferredRecord:
        """Return a record of the same arrays."""
        arrays = dict(self.items())
        return DeferredRecord(lambda: arrays)
