"""What acts around each optimizer step, without an edit in the user's training loop.

Three options act there: ``decay`` keeps the meaning of the optimizer's weight decay, ``clip``
bounds the gradient's norm, and ``schedule="decoupled"`` makes the first steps of a round private
and the others shared. They act only on optimizers that hold parameters of a converted model, and on
the gradients that the step really uses (`fedpara_plugins.training.real_steps`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim import Optimizer

from fedpara_plugins._moved import serve_old_names
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.layers.base import FactorisedLayer, Phase, layers_alive
from fedpara_plugins.layers.kept_weights import drop_before_step
from fedpara_plugins.support.torch_seams import forget_curvature, in_nested_backward
from fedpara_plugins.training.clip import check_last_norm, clip_gradients
from fedpara_plugins.training.decay import join_groups, split_groups
from fedpara_plugins.training.held_models import HeldModel, held_models
from fedpara_plugins.training.iteration import forget_iteration, iteration_of
from fedpara_plugins.training.label_counts import warn_without_counts
from fedpara_plugins.training.progress import DenseParameters, RoundProgress, layers_of, set_phase
from fedpara_plugins.training.real_steps import Step, StepObserver, add_observer
from fedpara_plugins.training.schedule_free import take_back_averaging

__all__ = [
    "RoundProgress",
    "attach_progress",
    "round_progress",
    "shared_phase",
    "start_round",
]


def attach_progress(model: nn.Module, config: FedParaConfig) -> None:
    """Attach a common `RoundProgress` to the layers of a freshly converted model."""
    layers = layers_of(model)
    private = any(plan.private_names for layer in layers for plan in layer.plans.values())
    decoupled = config.schedule == "decoupled" and private
    progress = RoundProgress(config, decoupled, config.first_private_steps)
    for layer in layers:
        layer.__dict__["progress"] = progress
        layers_alive.add(layer)
    start_round(model)


def round_progress(model: nn.Module) -> RoundProgress | None:
    """Return a converted model's `RoundProgress`; None if it has no factorised layer."""
    found = next((layer.progress for layer in layers_of(model)), None)
    return found if isinstance(found, RoundProgress) else None


def start_round(model: nn.Module, *, previous_steps: int | None = None) -> None:
    """Begin a round: under ``schedule="decoupled"`` the next steps are private again.

    Args:
        model: any module; one without factorised layers is left alone.
        previous_steps: number of steps in the previous round. The option ``private_steps`` may be a
            share of it; without it ``first_private_steps`` counts.
    """
    progress = round_progress(model)
    if progress is None:
        return
    check_last_norm(progress)
    wanted = progress.config.private_steps
    if wanted >= 1:
        progress.private_steps = int(wanted)
    elif previous_steps:
        progress.private_steps = max(1, round(wanted * previous_steps))
    else:
        progress.private_steps = progress.config.first_private_steps
    progress.steps = 0
    progress.rounds += 1
    progress.diverged = False
    progress.dense = DenseParameters.of(model)
    forget_iteration(progress)
    set_phase(layers_of(model), progress.phase)


@contextmanager
def shared_phase(model: nn.Module) -> Iterator[None]:
    """Set a model to its shared phase inside a context, wherever it is in its round."""
    progress = round_progress(model)
    if progress is None or not progress.decoupled:
        yield
        return
    layers = layers_of(model)
    set_phase(layers, "shared")
    try:
        yield
    finally:
        set_phase(layers, progress.phase)


_last_phase: weakref.WeakKeyDictionary[torch.optim.LBFGS, list[tuple[int, Phase]]]
_last_phase = weakref.WeakKeyDictionary()
"""For each LBFGS, round and phase of its last step, by model."""


def _begin(step: Step) -> None:
    """Let LBFGS forget the curvature of another phase, which would move that phase's factors."""
    if not isinstance(step.optimizer, torch.optim.LBFGS):
        return
    models = [model.progress for model in held_models(step.optimizer)]
    phases = [(progress.rounds, progress.phase) for progress in models if progress.decoupled]
    if _last_phase.get(step.optimizer, phases) != phases:
        forget_curvature(step.optimizer)
    _last_phase[step.optimizer] = phases


def _ready(step: Step) -> None:
    counts: dict[int, int] = {}
    decays = any(group.get("weight_decay") for group in step.optimizer.param_groups)
    for model in held_models(step.optimizer):
        progress, layers = model.progress, model.layers
        drop_before_step(layers)
        if progress.config.label_prior and progress.steps == 0:
            warn_without_counts(layers, given=progress.counts_given)
        iteration, begun = iteration_of(step, model)
        if step.evaluations == 1 and begun:
            step.continued.add(id(progress))
        left_out: set[int] = set()
        if progress.decoupled:
            _refuse_unknown_ends(step)
            left_out = _left_out(model, iteration.phase)
            take_back_averaging(step, model.own, left_out)
            _drop_gradients(model, left_out)
        if decays and progress.config.decay == "composed":
            counts.update(_factor_counts(layers))
        if progress.config.clip is not None:
            clip_gradients(step, model, iteration, left_out, progress.config.clip)
    if counts:
        split_groups(step.optimizer, counts)


def _end(step: Step) -> None:
    join_groups(step.optimizer)
    for model in held_models(step.optimizer):
        progress = model.progress
        if step.completed and id(progress) not in step.continued:
            progress.steps += 1
        set_phase(model.layers, progress.phase)


def _concerns(optimizer: Optimizer) -> bool:
    return bool(held_models(optimizer))


add_observer(StepObserver(_ready, _end, _begin, _concerns))


def _refuse_unknown_ends(step: Step) -> None:
    """Refuse the decoupled schedule where nothing says which steps are one step of the model."""
    name = type(step.optimizer).__name__
    if any(function == "second_step" for function, _ in step.callers()):
        raise ConfigError(
            f"option 'schedule': 'decoupled' leaves parameters out of each step, and the optimizer "
            f"around {name} has moved them already (SAM's first step): use {name} itself, or set "
            f"schedule='joint'"
        )
    if in_nested_backward():
        raise ConfigError(
            "option 'schedule': 'decoupled' counts whole steps, and this optimizer steps amid a "
            "backward pass that is a part of another one, which torch numbers like a pass of its "
            "own, so steps of one batch look like steps of several: checkpoint with "
            "use_reentrant=False, call step() after backward(), or set schedule='joint'"
        )


def _left_out(model: HeldModel, phase: Phase) -> set[int]:
    """Return the ids of the parameters, the model's and the optimizer's, that a phase leaves out.

    Parameters of the optimizer that are no part of the model are taken for shared ones.
    """
    private = {id(p) for layer in model.layers for p in layer.private_parameters()}
    if phase == "shared":
        return private
    return {id(p) for p in (*model.own, *model.others())} - private


def _drop_gradients(model: HeldModel, left_out: set[int]) -> None:
    """Drop the gradients of the other phase: optimizers skip such parameters entirely.

    Neither momentum nor decay moves a parameter without a gradient.
    """
    for parameter in model.own:
        if id(parameter) in left_out:
            parameter.grad = None


def _factor_counts(layers: Iterable[FactorisedLayer]) -> dict[int, int]:
    """Return for each factor, by id, how many factors shrink its part of the weight together.

    Fixed factors of the residual form are never trained, so they shrink nothing.
    """
    counts: dict[int, int] = {}
    for layer in layers:
        for weight, plan in layer.plans.items():
            private = set(plan.private_names)
            shared = len(plan.factor_names) - len(private) - len(plan.fixed_names)
            for name, factor in layer.factors(weight).items():
                counts[id(factor)] = len(private) if name in private else shared
    return counts


if not TYPE_CHECKING:
    # Models that an earlier release pickled refer to the class by this name.
    __getattr__ = serve_old_names(
        __name__, {"Training": "RoundProgress", "training_of": "round_progress"}
    )
