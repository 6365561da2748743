"""Composed weights as users see them: tensors that refuse to be written to.

A composed weight is new at each use, so a write to it would be lost without a word: that of
`torch.nn.init`, of ``weight.data.copy_``, or of PEFT when it merges an adapter. Such methods raise
here. What torch does below Python (``out=`` arguments, numpy views, writes through a view of the
weight) cannot be noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.factors.fast.conditions import rewritten
from fedpara_plugins.support.torch_seams import disabled_torch_function

__all__ = ["ReadOnlyWeight", "read_only", "refuse_write"]

HARMLESS = frozenset({"requires_grad_", "rename_", "share_memory_"})
"""Methods with the name of a write that change no value."""

OPERATORS = (
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__idiv__"),
    *("__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__"),
    *("__ilshift__", "__irshift__"),
)


def refuse_write(name: str) -> NoReturn:
    """Raise the error about a write to a composed weight.

    Args:
        name: the layer's attribute.

    Raises:
        ConversionError: always.
    """
    raise ConversionError(
        f"{name} is composed from factors at each use, so a write to it would be lost: write to "
        f"the dense weight before convert() (with init='fit' to keep its values), set the layer's "
        f"factors, or go back with to_dense() first"
    )


class ReadOnlyWeight(Tensor):
    """A composed weight; results of operations with it are plain tensors."""

    __torch_function__ = disabled_torch_function  # type: ignore[assignment]
    weight_name = "weight"

    @property
    def data(self) -> Tensor:
        """Return the values without the graph; they cannot be written to either."""
        return read_only(self.detach(), self.weight_name)

    @data.setter
    def data(self, value: Tensor) -> None:
        refuse_write(self.weight_name)

    def __deepcopy__(self, memo: Any) -> Tensor:
        plain = self.as_subclass(Tensor)
        return plain.__deepcopy__(memo)  # type: ignore[no-any-return,no-untyped-call]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def read_only(value: Tensor, name: str) -> Tensor:
    """Return a composed weight as a tensor that refuses to be written to.

    Args:
        value: the weight. Where operations are rewritten or recorded, it is returned as it is.
        name: the layer's attribute, for the error.
    """
    if type(value) is not Tensor or rewritten():
        return value
    found = value.as_subclass(ReadOnlyWeight)
    if name != "weight":
        found.weight_name = name
    return found


def _refusing(method: str) -> Callable[..., Any]:
    def refuse(self: ReadOnlyWeight, *args: Any, **options: Any) -> None:
        refuse_write(self.weight_name)

    refuse.__name__ = method
    return refuse


for _name in dir(Tensor):
    _writes = _name.endswith("_") and not _name.startswith("_") and _name not in HARMLESS
    if _writes or _name in OPERATORS:
        setattr(ReadOnlyWeight, _name, _refusing(_name))
