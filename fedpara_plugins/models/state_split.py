"""The division of a model's state into shared and private parts, and the way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.wrapper_names import wrapper_hint

__all__ = ["Split", "merge", "shared_names", "split"]


class Split(NamedTuple):
    """The two parts of a model's state, each in the state's order."""

    shared: dict[str, Tensor]
    """Tensors that may travel: shared factors, biases, norms, dense layers, buffers."""
    private: dict[str, Tensor]
    """Tensors that never leave the device, such as pFedPara's second operand (section 2.3)."""


def shared_names(spec: ModelSpec) -> tuple[str, ...]:
    """Return the names of the state that may enter a message, in order.

    Every sender asks this function; nothing else decides it.
    """
    return spec.shared_keys


def split(model: nn.Module) -> Split:
    """Split a converted model's state into its shared and its private part.

    The tensors are detached and share memory with the model, as those of ``state_dict()`` do.
    """
    state = model.state_dict()
    shared = set(shared_names(ModelSpec.of(model)))
    return Split(
        shared={key: value for key, value in state.items() if key in shared},
        private={key: value for key, value in state.items() if key not in shared},
    )


def merge(
    spec: ModelSpec, shared: Mapping[str, Tensor], private: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the whole state in the model's order, for ``load_state_dict(strict=True)``.

    Raises:
        PayloadError: a name of the model is in neither part, or a part has a name too many.
    """
    state, names = {**shared, **private}, set(spec.keys)
    missing = [key for key in spec.keys if key not in state]
    extra = [key for key in state if key not in names]
    if missing or extra:
        raise PayloadError(
            f"the parts do not make up the model's state: missing {missing}, not expected {extra}."
            + wrapper_hint(state, spec.keys)
        )
    return {key: state[key] for key in spec.keys}
