"""The hook before each optimizer step, which needs no edit in the user's training loop.

Three options act there: ``decay`` keeps the meaning of the optimizer's weight decay, ``clip``
bounds the gradient's norm, and ``schedule="decoupled"`` makes the first steps of a round private
and the others shared. The hook acts only on optimizers that hold factors.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fedpara_plugins._moved import serve_old_names
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.layers.base import FactorisedLayer, Phase, layers_alive
from fedpara_plugins.layers.kept_weights import drop_before_step
from fedpara_plugins.support.torch_seams import register_optimizer_step_pre_hook
from fedpara_plugins.training.decay import compose_decay
from fedpara_plugins.training.label_counts import warn_without_counts

__all__ = [
    "RoundProgress",
    "attach_progress",
    "round_progress",
    "shared_phase",
    "start_round",
]


@dataclass
class RoundProgress:
    """The progress of a model in its round: one object for all layers, another for each copy.

    Attributes:
        config: the options that the model was converted with.
        decoupled: whether private and shared steps are separate.
        private_steps: number of private steps at the start of this round.
        steps: number of steps made in this round so far.
        counts_given: whether `fedpara_plugins.set_label_counts` was called on the model.
    """

    config: FedParaConfig
    decoupled: bool
    private_steps: int
    steps: int = 0
    counts_given: bool = False

    @property
    def phase(self) -> Phase:
        """Which factors the next step moves."""
        if not self.decoupled:
            return "joint"
        return "private" if self.steps < self.private_steps else "shared"


def attach_progress(model: nn.Module, config: FedParaConfig) -> None:
    """Attach a common `RoundProgress` to the layers of a freshly converted model."""
    layers = _layers_of(model)
    private = any(plan.private_names for layer in layers for plan in layer.plans.values())
    decoupled = config.schedule == "decoupled" and private
    progress = RoundProgress(config, decoupled, config.first_private_steps)
    for layer in layers:
        layer.__dict__["progress"] = progress
        layers_alive.add(layer)
    start_round(model)


def round_progress(model: nn.Module) -> RoundProgress | None:
    """Return a converted model's `RoundProgress`; None if it has no factorised layer."""
    found = next((layer.progress for layer in _layers_of(model)), None)
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
    wanted = progress.config.private_steps
    if wanted >= 1:
        progress.private_steps = int(wanted)
    elif previous_steps:
        progress.private_steps = max(1, round(wanted * previous_steps))
    else:
        progress.private_steps = progress.config.first_private_steps
    progress.steps = 0
    _set_phase(_layers_of(model), progress.phase)


@contextmanager
def shared_phase(model: nn.Module) -> Iterator[None]:
    """Set a model to its shared phase inside a context, wherever it is in its round."""
    progress = round_progress(model)
    if progress is None or not progress.decoupled:
        yield
        return
    layers = _layers_of(model)
    _set_phase(layers, "shared")
    try:
        yield
    finally:
        _set_phase(layers, progress.phase)


_held: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[int, list[Any]]]
_held = weakref.WeakKeyDictionary()
"""For each optimizer its number of parameters, and weak references to the layers that own them."""


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    layers = _layers_held_by(optimizer)
    drop_before_step(layers)
    for progress in {id(layer.progress): layer.progress for layer in layers}.values():
        of_model = [layer for layer in layers if layer.progress is progress]
        if progress.config.label_prior and progress.steps == 0:
            warn_without_counts(of_model, given=progress.counts_given)
        if progress.decoupled:
            _drop_other_gradients(optimizer, of_model, progress.phase)
        if progress.config.decay == "composed":
            compose_decay(optimizer, _factor_counts(of_model))
        if progress.config.clip is not None:
            nn.utils.clip_grad_norm_(_parameters(optimizer), progress.config.clip)
        progress.steps += 1
        _set_phase(of_model, progress.phase)


register_optimizer_step_pre_hook(_before_step)


def _layers_held_by(optimizer: torch.optim.Optimizer) -> list[FactorisedLayer]:
    size = len(_parameters(optimizer))
    if optimizer not in _held or _held[optimizer][0] != size:
        held = {id(parameter) for parameter in _parameters(optimizer)}
        found = [
            weakref.ref(layer)
            for layer in list(layers_alive)
            if any(id(parameter) in held for parameter in layer.parameters(recurse=False))
        ]
        _held[optimizer] = (size, found)
    return [layer for ref in _held[optimizer][1] if (layer := ref()) is not None]


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _drop_other_gradients(
    optimizer: torch.optim.Optimizer, layers: Iterable[FactorisedLayer], phase: Phase
) -> None:
    """Drop the gradients of the other phase: optimizers skip such parameters entirely.

    Neither momentum nor decay moves a parameter without a gradient.
    """
    private = {id(parameter) for layer in layers for parameter in layer.private_parameters()}
    for parameter in _parameters(optimizer):
        if (id(parameter) in private) != (phase == "private"):
            parameter.grad = None


def _factor_counts(layers: Iterable[FactorisedLayer]) -> dict[int, int]:
    """Return for each factor, by id, how many factors shrink its part of the weight together."""
    counts: dict[int, int] = {}
    for layer in layers:
        for weight, plan in layer.plans.items():
            private = set(plan.private_names)
            for name, factor in layer.factors(weight).items():
                together = [n for n in plan.factor_names if (n in private) == (name in private)]
                counts[id(factor)] = len(together)
    return counts


def _set_phase(layers: Iterable[FactorisedLayer], phase: Phase) -> None:
    for layer in layers:
        layer.__dict__["phase"] = phase


def _layers_of(model: nn.Module) -> list[FactorisedLayer]:
    return [layer for layer in model.modules() if isinstance(layer, FactorisedLayer)]


if not TYPE_CHECKING:
    # Models that an earlier release pickled refer to the class by this name.
    __getattr__ = serve_old_names(
        __name__, {"Training": "RoundProgress", "training_of": "round_progress"}
    )
