"""The steps that several optimizers make from one backward pass, which are one step of the model.

The first of them sees the gradients of all. What it has found out about them (the phase of the
schedule, the clip's factor) holds for the others, as long as nobody has computed new gradients.
Steps amid a backward pass, made by hooks of parameters, are one step as well, which ends with the
pass.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from fedpara_plugins.layers.base import Phase
from fedpara_plugins.support.torch_seams import (
    TensorWeakRef,
    at_end_of_backward,
    backward_number,
    scaler_round,
    version_of,
)
from fedpara_plugins.training.held_models import HeldModel
from fedpara_plugins.training.progress import RoundProgress, set_phase
from fedpara_plugins.training.real_steps import Step

__all__ = ["Iteration", "forget_iteration", "iteration_of"]


@dataclass
class Iteration:
    """What the first optimizer of an iteration has found.

    Attributes:
        phase: which factors the iteration's steps move.
        factor: what the clip multiplies gradients by; None until it was computed.
        scaler_round: with a scaler, what it replaces between iterations.
        waiting: gradients of parameters that other optimizers hold, and their versions then.
        backward: the number of the backward pass amid which the steps are made, if any.
    """

    phase: Phase
    factor: Tensor | None
    scaler_round: object
    waiting: dict[int, tuple[TensorWeakRef, int]]
    backward: int | None = None

    def continues(self, step: Step, own: Iterable[Tensor]) -> bool:
        """Return whether a step is of this iteration too."""
        amid = backward_number()
        if amid is not None:
            return self.backward == amid
        if step.scaler is not None:
            return self.scaler_round is scaler_round(step.scaler)
        gradients = [(id(p), p.grad) for p in own if p.grad is not None]
        return bool(gradients) and all(
            key in self.waiting
            and self.waiting[key][0]() is gradient
            and self.waiting[key][1] == version_of(gradient)
            for key, gradient in gradients
        )


_iterations: weakref.WeakKeyDictionary[RoundProgress, Iteration] = weakref.WeakKeyDictionary()


def iteration_of(step: Step, model: HeldModel) -> tuple[Iteration, bool]:
    """Return the iteration that a step belongs to, and whether it is counted by another step.

    An optimizer that has no gradient of the model begins none: it moves nothing. An iteration amid
    a backward pass is counted at the end of the pass, when the next forward may be of another
    phase; the same pass may compute a forward again (activation checkpointing).

    Args:
        step: a step whose gradients are ready.
        model: one of the models that its optimizer holds.
    """
    before = _iterations.get(model.progress)
    if before is not None and step.evaluations == 1 and before.continues(step, model.own):
        return before, True
    if all(p.grad is None for p in model.own):
        return Iteration(model.progress.phase, None, None, {}), True
    if (amid := backward_number()) is not None:
        return _begin_amid_backward(model, amid), True
    waiting = _gradients(() if model.is_whole else model.others())
    scaling = None if step.scaler is None else scaler_round(step.scaler)
    found = Iteration(model.progress.phase, None, scaling, waiting)
    if waiting or scaling is not None:
        _iterations[model.progress] = found
    elif before is not None:
        forget_iteration(model.progress)
    return found, False


def _begin_amid_backward(model: HeldModel, number: int) -> Iteration:
    found = _iterations[model.progress] = Iteration(model.progress.phase, None, None, {}, number)

    def end() -> None:
        model.progress.steps += 1
        set_phase(model.layers, model.progress.phase)
        found.waiting = _gradients((*model.own, *model.others()))  # for steps after the pass

    at_end_of_backward(end)
    return found


def _gradients(parameters: Iterable[Tensor]) -> dict[int, tuple[TensorWeakRef, int]]:
    return {
        id(p): (TensorWeakRef(p.grad), version_of(p.grad)) for p in parameters if p.grad is not None
    }


def forget_iteration(progress: RoundProgress) -> None:
    """Let the next step begin an iteration."""
    _iterations.pop(progress, None)
