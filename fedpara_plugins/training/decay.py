"""Weight decay that shrinks a composed weight as it would shrink a dense one.

An optimizer that decays each of F factors by (1 - lr wd) shrinks their product by (1 - lr wd)^F,
about F times as fast as the user asked for. Just before the step, what it is about to do too much
is taken back: from the gradient where the decay is part of it (SGD, Adam), from the factor where
the optimizer shrinks that itself (AdamW, Muon, Adafactor).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["compose_decay"]

log = logging.getLogger(__name__)

COUPLED = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.RMSprop,
    torch.optim.ASGD,
)
"""Optimizers whose weight decay is a term of the gradient, unless their group says otherwise."""

DECOUPLED = tuple(
    getattr(torch.optim, name)
    for name in ("AdamW", "Adafactor", "Muon")
    if hasattr(torch.optim, name)  # as far as the installed torch has them
)
"""Optimizers that multiply the parameter itself by 1 - lr * weight_decay."""

_unknown: set[type[torch.optim.Optimizer]] = set()


def compose_decay(optimizer: torch.optim.Optimizer, counts: Mapping[int, int]) -> None:
    """Correct the step that is about to come for factors under weight decay.

    Args:
        optimizer: any of torch's; of another kind the decay stays on the factors, with a warning.
        counts: for each factor, by id, how many factors shrink together.
    """
    for group in optimizer.param_groups:
        decay = float(group.get("weight_decay", 0.0))
        factors = [p for p in group["params"] if id(p) in counts and p.grad is not None]
        if not decay or not factors:
            continue
        decoupled = _is_decoupled(optimizer, group)
        if decoupled is None:
            _warn_once(type(optimizer))
            return
        with torch.no_grad():
            for factor in factors:
                excess = 1 - 1 / counts[id(factor)]
                if decoupled:
                    shrink = 1 - float(group["lr"]) * decay
                    factor.mul_(shrink**-excess if shrink > 0 else 1.0)
                else:
                    # With maximize the optimizer turns the gradient before it adds the decay.
                    sign = 1 if group.get("maximize") else -1
                    factor.grad.add_(factor, alpha=sign * decay * excess)


def _is_decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool | None:
    if isinstance(optimizer, DECOUPLED) or group.get("decoupled_weight_decay"):
        return True
    return False if isinstance(optimizer, COUPLED) else None


def _warn_once(kind: type[torch.optim.Optimizer]) -> None:
    if kind not in _unknown:
        _unknown.add(kind)
        log.warning(
            "fedpara: weight decay of %s acts on factors, so composed weights shrink as many times "
            "as fast as they have factors; divide it by that, or use one of torch's optimizers",
            kind.__name__,
        )
