"""FedNova's normaliser |a|: how far a client's optimizer would go with gradients of 1."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import observe_steps

__all__ = ["Normaliser", "check_sgd", "counting_steps"]

COUNTED = ("lr", "momentum", "dampening", "nesterov")
"""Options of a group of SGD that enter |a|."""


class Normaliser:
    """The distance that gradients of 1 would cover, in units of the first learning rate.

    It is the number of steps for plain SGD, and the sums of the paper for momentum and for the
    proximal term. Weight decay is part of the gradient, as in the paper.

    Args:
        mu: of the proximal term.

    Attributes:
        length: |a|.
    """

    def __init__(self, mu: float) -> None:
        self.mu = mu
        self.length = 0.0
        self._unit = 0.0
        self._buffers: weakref.WeakKeyDictionary[Optimizer, float] = weakref.WeakKeyDictionary()

    def step(self, optimizer: Optimizer, groups: Sequence[Mapping[str, Any]]) -> None:
        """Add one step of SGD.

        Args:
            optimizer: that makes it.
            groups: its groups that contain counted parameters.

        Raises:
            ConfigError: if the groups differ, so that one number cannot normalise them.
        """
        kinds = {tuple(float(group[key]) for key in COUNTED) for group in groups}
        if len(kinds) > 1:
            raise ConfigError(
                f"FedNova normalises a client's step by one number, which there is only if all "
                f"groups of its SGD have the same {', '.join(COUNTED)}; they have {sorted(kinds)}"
            )
        for rate, momentum, dampening, nesterov in kinds:
            self._unit = self._unit or rate
            gradient = 1.0 - self.mu * self._unit * self.length
            move = gradient
            if momentum:
                before = self._buffers.get(optimizer)
                buffer = (
                    gradient if before is None else momentum * before + (1 - dampening) * gradient
                )
                self._buffers[optimizer] = buffer
                move = gradient + momentum * buffer if nesterov else buffer
            self.length += (rate / self._unit if self._unit else 0.0) * move


def check_sgd(optimizer: Optimizer) -> None:
    """Raise for an optimizer whose normaliser is not known.

    Raises:
        ConfigError: if it is not ``torch.optim.SGD``.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        raise ConfigError(
            f"FedNova's normaliser is that of torch.optim.SGD, and the training loop uses "
            f"{type(optimizer).__name__}; use SGD, or FedAvg or FedDyn, which work with any "
            f"optimizer"
        )


@contextmanager
def counting_steps(parameters: Mapping[str, Tensor], normaliser: Normaliser) -> Iterator[None]:
    """Add each step of an optimizer that holds any of the parameters to a normaliser."""
    known = {id(parameter) for parameter in parameters.values()}

    def hook(optimizer: Optimizer) -> None:
        held = [g for g in optimizer.param_groups if any(id(p) in known for p in g["params"])]
        if any(p.grad is not None for g in held for p in g["params"] if id(p) in known):
            normaliser.step(optimizer, held)

    with observe_steps(hook):
        yield
