"""Weight decay that shrinks a composed weight as it would shrink a dense one.

An optimizer that decays each of F factors by (1 - lr wd) shrinks their product by (1 - lr wd)^F,
about F times as fast as the user asked for. The excess is compensated just before the step: in the
gradient if the decay is a term of it (SGD, Adam), in the factor if the optimizer shrinks the factor
itself (AdamW, Muon, Adafactor).
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
    if hasattr(torch.optim, name)  # older versions of torch lack some
)
"""Optimizers that multiply the parameter itself by 1 - lr * weight_decay."""

_unknown: set[type[torch.optim.Optimizer]] = set()


def compose_decay(optimizer: torch.optim.Optimizer, counts: Mapping[int, int]) -> None:
    """Correct an optimizer's next step for factors under weight decay.

    Args:
        optimizer: one of torch's. With another kind the decay stays on the factors, and a warning
            is logged.
        counts: for each factor, by id, the number of factors that shrink together.
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
                    # With maximize the optimizer negates the gradient, then adds the decay.
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
