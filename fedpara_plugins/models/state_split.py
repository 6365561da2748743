"""Which state is shared and which is private, and how the whole is put together again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor, nn

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.models.spec import ModelSpec

__all__ = ["Split", "merge", "shared_names", "split"]


class Split(NamedTuple):
    """A model's state in two parts; both keep the state's order."""

    shared: dict[str, Tensor]
    """Everything that may travel: shared factors, biases, norms, dense layers, buffers."""
    private: dict[str, Tensor]
    """What never leaves the device: pFedPara's second operand (paper, section 2.3)."""


def shared_names(spec: ModelSpec) -> tuple[str, ...]:
    """The names of the state that may enter a message, in order.

    The one place that decides this: every sender asks here.
    """
    return spec.shared_keys


def split(model: nn.Module) -> Split:
    """Split a converted model's state into what is shared and what is private.

    The tensors are detached but share memory with the model, as ``state_dict()`` does.
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
    """The complete state, in the model's order, ready for ``load_state_dict(strict=True)``.

    Raises:
        PayloadError: a name of the model is in neither part, or a part has a name too many.
    """
    have = {**shared, **private}
    missing = [key for key in spec.keys if key not in have]
    extra = [key for key in have if key not in set(spec.keys)]
    if missing or extra:
        raise PayloadError(
            f"the parts do not make up the model's state: missing {missing}, not expected {extra}"
        )
    return {key: have[key] for key in spec.keys}
