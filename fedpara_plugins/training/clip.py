"""The bound on the gradient of a step: its norm over the whole model, or each factor's own step."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fedpara_plugins.support.torch_seams import in_backward
from fedpara_plugins.training.held_models import HeldModel
from fedpara_plugins.training.iteration import Iteration
from fedpara_plugins.training.progress import RoundProgress
from fedpara_plugins.training.real_steps import Step
from fedpara_plugins.training.relative_clip import clip_relatively, share_of

__all__ = ["check_last_norm", "clip_gradients"]

log = logging.getLogger(__name__)

_partial: weakref.WeakSet[RoundProgress] = weakref.WeakSet()
"""Models of which the log says that the bound is not over the whole model."""

_norms: weakref.WeakKeyDictionary[RoundProgress, tuple[int, str, Tensor]]
_norms = weakref.WeakKeyDictionary()
"""Of each model on an accelerator, number, optimizer and norm of its last step."""


def clip_gradients(
    step: Step, model: HeldModel, iteration: Iteration, left_out: set[int], bound: float | str
) -> None:
    """Multiply the gradients of a step such that it is within the bound.

    A number bounds the whole model's norm: gradients that wait for another optimizer's step count,
    and are left to that step. A text bounds each factor's step (`clip_relatively`), except
    under LBFGS with a line search.

    Args:
        step: a step whose gradients are ready, and may be scaled.
        model: the model that they are of.
        iteration: holds the factor, if another optimizer has computed it.
        left_out: ids of the parameters that this iteration does not move.
        bound: a value of the option ``clip``.
    """
    if isinstance(bound, str) and _searches(step.optimizer):
        return  # the search bounds the step, and compares losses with gradients as they are
    if isinstance(bound, str):
        norm = clip_relatively(step, model, share_of(bound))
    else:
        norm = _clip_norm(step, model, iteration, left_out, bound)
    if norm is not None:
        _watch(step, model.progress, norm)


def _searches(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer searches along a line for the length of its step."""
    return any(group.get("line_search_fn") for group in optimizer.param_groups)


def _clip_norm(
    step: Step, model: HeldModel, iteration: Iteration, left_out: set[int], bound: float
) -> Tensor | None:
    """Bound the norm, and return it before that; None if the optimizer has no gradient."""
    own = [p for p in model.own if p.grad is not None]
    if not own:
        return None
    step.unscale()
    if model.is_whole:
        norm = nn.utils.clip_grad_norm_(own, bound)
    else:
        factor = iteration.factor
        if factor is None or step.scaler is not None or in_backward():
            others = _waiting(step, model, left_out)
            norm = _norm([*own, *others])
            factor = (bound / (norm + 1e-6)).clamp(max=1.0)
            iteration.factor = None if in_backward() else factor  # others have no gradients yet
        else:
            norm = torch.zeros(())
        for parameter in own:
            assert parameter.grad is not None
            parameter.grad.mul_(factor.to(parameter.grad.device))
    return norm


def _waiting(step: Step, model: HeldModel, left_out: set[int]) -> list[Tensor]:
    """Return the other optimizers' parameters whose gradients count; log where they cannot."""
    others = [p for p in model.others() if p.requires_grad and id(p) not in left_out]
    if step.scaler is not None:
        _say_partial(step, model, "the gradients of the others may still be scaled")
        return []
    if in_backward() or not all(p.grad is not None for p in others):
        _say_partial(step, model, "not all others have gradients at the same time")
    return [p for p in others if p.grad is not None]


def _say_partial(step: Step, model: HeldModel, why: str) -> None:
    if model.progress not in _partial:
        _partial.add(model.progress)
        log.warning(
            "fedpara: %s holds only a part of the model's parameters, and %s: the option clip "
            "bounds the gradient's norm over those that are there in each step, not over the "
            "whole model",
            type(step.optimizer).__name__,
            why,
        )


def _norm(parameters: Iterable[Tensor]) -> Tensor:
    norms = []
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        norms.append(torch.linalg.vector_norm(values.detach()))
    norm: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return norm


def _watch(step: Step, progress: RoundProgress, norm: Tensor) -> None:
    """Look at the norm: at once, or on an accelerator before the next step, without waiting."""
    check_last_norm(progress)
    _norms[progress] = progress.steps + 1, type(step.optimizer).__name__, norm
    if norm.device.type == "cpu":
        check_last_norm(progress)


def check_last_norm(progress: RoundProgress) -> None:
    """Log, once a round, that a step's gradient was not finite."""
    number, optimizer, norm = _norms.pop(progress, (0, "", None))
    if norm is None or progress.diverged or bool(torch.isfinite(norm)):
        return
    progress.diverged = True
    log.warning(
        "fedpara: the gradient of step %d of this round (%s) holds NaN or infinite values, which "
        "the option clip cannot bound: the model is not finite from here on. Lower the learning "
        "rate, or look for the first loss that is not finite",
        number,
        optimizer,
    )
