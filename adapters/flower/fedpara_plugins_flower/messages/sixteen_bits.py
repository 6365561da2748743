"""Records of bfloat16 tensors, which NumPy does not have, so that Flower alone cannot make them.

Such a tensor stands in a record as float32, which is exact, in an array that names its dtype.
Strategies compute with float32; the plugin's messages and the app's models have bfloat16.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedpara_plugins import ConfigError

__all__ = ["BFLOAT16", "TypedRecord", "array_of", "arrays", "hint_of", "tensor_of"]

BFLOAT16 = "bfloat16"
"""The dtype that such an array names; NumPy's header inside says float32."""


class TypedRecord(ArrayRecord):
    """A record whose ``to_torch_state_dict`` gives bfloat16 where it was given bfloat16."""

    # Flower writes this name before the bytes of a record, and knows its own classes alone.
    __qualname__ = ArrayRecord.__qualname__

    def __reduce__(self) -> tuple[Any, ...]:
        return _typed, (dict(self.items()),)

    def to_torch_state_dict(self, *, keep_input: bool = True) -> OrderedDict[str, Tensor]:
        """Return the tensors by name, in the dtypes that they had."""
        names = [name for name, array in self.items() if array.dtype == BFLOAT16]
        state: OrderedDict[str, Tensor] = super().to_torch_state_dict(keep_input=keep_input)
        state.update((name, state[name].bfloat16()) for name in names)
        return state


def _typed(content: Mapping[str, Array]) -> TypedRecord:
    return TypedRecord(dict(content))


def arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a state as a record: ``ArrayRecord(state)``, also for bfloat16.

    Args:
        state: tensors by name, such as ``model.state_dict()``.

    Raises:
        ConfigError: a tensor's dtype is neither bfloat16 nor one of NumPy's.
    """
    record = TypedRecord()
    for name, value in state.items():
        try:
            record[name] = array_of(value)
        except TypeError as error:
            raise ConfigError(
                f"fedpara: tensor {name!r} of dtype {value.dtype} cannot stand in a record of "
                f"arrays ({error}): send it as bfloat16, float16 or float32, and keep quantised "
                f"weights out of what is sent"
            ) from error
    return record


def array_of(value: Tensor) -> Array:
    """Return a tensor as an array; bfloat16 as float32 under its own name."""
    value = value.detach().cpu()
    if value.dtype != torch.bfloat16:
        return Array(value.numpy())
    wide = Array(value.float().numpy())
    return Array(dtype=BFLOAT16, shape=wide.shape, stype=wide.stype, data=wide.data)


def tensor_of(array: Array) -> Tensor:
    """Return an array as a tensor with memory of its own, in the dtype that it names."""
    tensor = torch.from_numpy(np.array(array.numpy()))
    return tensor.bfloat16() if array.dtype == BFLOAT16 else tensor


def hint_of(error: Exception) -> str | None:
    """Return what to write if an app's error is that of a bfloat16 tensor; else None."""
    if not (isinstance(error, TypeError) and "ScalarType BFloat16" in str(error)):
        return None
    return (
        f"fedpara: the app makes NumPy arrays of bfloat16 tensors, which NumPy does not have "
        f"({error}). Write fedpara.arrays(model.state_dict()) in the place of "
        f"ArrayRecord(model.state_dict())"
    )
