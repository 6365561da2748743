"""The start of private tensors that are no factors: what the client's own model holds.

A norm that is private (FedBN), a head (FedPer), a buffer or a table of positions starts as the
user's code built or loaded it. The name of a tensor does not say what its first value is.

A client that has its model at hand takes these values from `ModelSpec.of`. Where the model is built
after the message was decoded, the message is completed with values that stand in, and
`keep_own_values` makes the model keep its own when it loads them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.support.torch_seams import register_load_state_dict_pre_hook

__all__ = ["first_values", "keep_own_values"]


def first_values(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Return copies of the named tensors of a model's state, on the CPU.

    Args:
        model: before it is trained or loads a state.
        names: of its state. Those on the meta device are left out.
    """
    state = model.state_dict() if names else {}
    found = {name: state[name].detach() for name in names if name in state}
    return {n: v.cpu().clone() for n, v in found.items() if not v.is_meta}


def keep_own_values(model: nn.Module, standing_in: Mapping[str, Tensor]) -> None:
    """Let a model keep its own values where a state that it loads has those that stand in.

    Args:
        model: as the client's code built it.
        standing_in: first values that the client was given for tensors of which it has none
            (`ModelSpec.initial_private`), by full name. A state in which such a tensor has any
            other value, because the user's code or training changed it, is loaded as it is.
    """
    own = first_values(model, standing_in)
    given = {name: standing_in[name].detach().cpu().clone() for name in own}
    if own:
        register_load_state_dict_pre_hook(model, _OwnValues(own, given))


@dataclass
class _OwnValues:
    """The hook of `keep_own_values`; an object of a class, so that the model can be pickled."""

    own: dict[str, Tensor]
    standing_in: dict[str, Tensor]

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        for name, value in self.own.items():
            given = state.get(prefix + name)
            if isinstance(given, Tensor) and _equal(given, self.standing_in[name]):
                state[prefix + name] = value.to(given.device, given.dtype)


def _equal(given: Tensor, expected: Tensor) -> bool:
    return given.shape == expected.shape and torch.equal(
        given.detach().cpu(), expected.detach().cpu().to(given.dtype)
    )
