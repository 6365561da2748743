"""What settings that a user carries over from a dense model mean on factors, measured.

A model's own layers are drawn afresh, an optimizer of the user's kind makes steps on them, and the
movement of the composed weight is compared with that of a dense weight under the same setting.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.factors.initialise import initial_factors
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.models.attached_config import config_of
from fedpara_plugins.support.findings import Finding
from fedpara_plugins.training.decay import COUPLED
from fedpara_plugins.training.step_hooks import attach_progress

__all__ = ["Settings", "check_settings", "measured_decay", "measured_speed", "settings_of"]

PROBED = 4
"""Weights that are measured, those with most entries; the others follow the same formulas."""

NORMALISING = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user's training loop sets, 0 where it sets nothing.

    Attributes:
        optimizer: the class, such as `torch.optim.SGD`; None if it is not known.
        lr: learning rate.
        weight_decay: of the optimizer.
        mu: of a proximal term mu/2 |w - w_global|² (FedProx).
    """

    optimizer: type[Optimizer] | None = None
    lr: float = 0.0
    weight_decay: float = 0.0
    mu: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "mu"):
            if not 0 <= getattr(self, name) < float("inf"):
                flag = name.replace("_", "-")
                raise ConfigError(
                    f"--{flag}: expected a number of at least 0, got {getattr(self, name)!r}"
                )


def settings_of(optimizer: Optimizer) -> Settings:
    """The settings of an optimizer's first group."""
    group = optimizer.param_groups[0]
    return Settings(
        optimizer=type(optimizer),
        lr=float(group.get("lr", 0.0)),
        weight_decay=float(group.get("weight_decay", 0.0)),
    )


def check_settings(model: nn.Module, settings: Settings) -> list[Finding]:
    """One line for each setting: what it does on this model's factors, and what to do.

    Args:
        model: a converted model; not modified.
        settings: of the user's training.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FactorisedLayer)]
    plans = [plan for layer in layers for plan in layer.plans.values()]
    if not plans:
        return []
    probed = sorted(plans, key=lambda plan: -prod(plan.shape))[:PROBED]
    config = config_of(model)
    if config.local == "dense":
        text = (
            "clients train dense weights: learning rate, weight decay and mu are those of the "
            "dense model, and the options clip, speed and decay have nothing to act on"
        )
        return [Finding("note", 'local = "dense"', text)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        speed = sum(map(measured_speed, probed)) / len(probed)
        lines = [*_learning_rate(settings, speed), *_clip(config)]
        lines += _weight_decay(layers, settings, config)
        lines += _mu(settings, speed, any(plan.private_names for plan in plans))
    return lines


def _learning_rate(settings: Settings, speed: float) -> Iterator[Finding]:
    rate = f"learning rate {settings.lr:g}" if settings.lr else "learning rate"
    text = (
        f"a step of SGD moves composed weights {speed:.2f} times as far as dense ones (K, measured "
        f"at fresh factors)"
    )
    if settings.optimizer is not None and issubclass(settings.optimizer, NORMALISING):
        text = (
            f"a step of {settings.optimizer.__name__} moves composed weights by 1.1 to 1.3 times "
            f"sqrt(K) = {speed**0.5:.2f} as far as dense ones (K measured {speed:.2f})"
        )
    yield Finding("note", rate, f"{text}; keep your rate, or set the option speed")


def _clip(config: FedParaConfig) -> Iterator[Finding]:
    if config.clip is None:
        text = "off; factors run away where dense weights only overshoot: set clip = 1.0 unless"
        yield Finding("note", "clip", f"{text} your own loop clips gradients")
    else:
        text = "bounds the gradient by all parameters, factors among them, before every step; a"
        yield Finding(
            "note", f"clip {config.clip:g}", f"{text} bound of your own loop acts on factors too"
        )


def _weight_decay(
    layers: list[FactorisedLayer], settings: Settings, config: FedParaConfig
) -> Iterator[Finding]:
    if not settings.weight_decay:
        return
    subject, kind = f"weight decay {settings.weight_decay:g}", settings.optimizer
    if kind is None:
        yield Finding("note", subject, "give --optimizer as well: what it does depends on that")
        return
    largest = max(layers, key=lambda layer: max(prod(p.shape) for p in layer.plans.values()))
    factors = len(next(iter(largest.plans.values())).factor_names)
    if not issubclass(kind, (*COUPLED, torch.optim.AdamW)):
        yield Finding(
            "attention",
            subject,
            f"{kind.__name__} is not one of torch's optimizers: its decay acts on each of up to "
            f"{factors} factors and shrinks composed weights as many times as fast; divide it by "
            f"that, or use one of torch's",
        )
        return
    if issubclass(kind, NORMALISING) and kind is not torch.optim.AdamW:
        share = "1/F of it (F factors) is" if config.decay == "composed" else "all of it is"
        yield Finding(
            "note",
            subject,
            f"{kind.__name__} puts decay through its normalisation, so that it is no rate of "
            f"shrinking, for dense weights neither; {share} added to the gradient of each factor. "
            f"Use AdamW for a decay that means the same",
        )
        return
    rate = measured_decay(largest, kind, decay=config.decay)
    text = (
        f"with {kind.__name__} and decay={config.decay!r} composed weights shrink {rate:.2f} times "
        f"as fast as dense ones (measured)"
    )
    if config.decay == "composed":
        yield Finding("note", subject, f"{text}: keep your setting")
    else:
        yield Finding("attention", subject, f"{text}: divide it by that, or set decay='composed'")


def _mu(settings: Settings, speed: float, private: bool) -> Iterator[Finding]:
    if not settings.mu:
        return
    text = (
        f"over factors it holds composed weights back as mu = {settings.mu / speed:.2g} would hold "
        f"dense ones (1/K, K measured {speed:.2f}): set mu = {settings.mu * speed:.2g} for the "
        f"balance of gradient and pull that you had"
    )
    if private:
        text += "; leave private factors out of the term, they have no global value"
    yield Finding("attention", f"mu {settings.mu:g}", text)


def measured_speed(plan: WeightPlan) -> float:
    """K of the shared factors: <W(step) - W, -G> / (rate |G|²), to first order, for a random G."""
    factors = {
        name: value.requires_grad_(name not in plan.private_names)
        for name, value in initial_factors(plan, seed=0, key="probe").items()
    }
    shared = [value for value in factors.values() if value.requires_grad]
    weight = plan.compose(factors)
    gradient = torch.randn_like(weight)
    pulled = torch.autograd.grad((weight * gradient).sum(), shared)
    # The derivative along the pulled-back gradient, times it, is |JᵀG|².
    return float(sum(p.square().sum() for p in pulled) / gradient.square().sum())


def measured_decay(layer: FactorisedLayer, kind: Callable[..., Optimizer], *, decay: str) -> float:
    """How fast one step with no gradient shrinks a composed weight by its decay, dense = 1.

    Args:
        layer: of a converted model; a copy of it makes the step.
        kind: the optimizer's class.
        decay: as in the config.
    """
    own = copy.deepcopy(layer).train().float()
    attach_progress(own, FedParaConfig(method="fedpara", decay=decay))
    own.reset_parameters()
    weight = next(iter(own.plans))
    for parameter in own.parameters():
        parameter.requires_grad_().grad = torch.zeros_like(parameter)
    before: Tensor = own.composed_weight(weight).detach()
    lr, amount = 1e-2, 1e-1
    kind(own.parameters(), lr=lr, weight_decay=amount).step()
    after = own.composed_weight(weight).detach()
    return float(1 - (after * before).sum() / before.square().sum()) / (lr * amount)
