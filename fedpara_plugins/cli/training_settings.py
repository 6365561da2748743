"""`fedpara doctor`: the effect of a dense model's training settings on factors, measured.

The layers of the model get fresh factors and an optimizer of the user's class makes steps on them.
The movement of the composed weights is compared with that of dense weights under the same settings.
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
from fedpara_plugins.training.relative_clip import share_of
from fedpara_plugins.training.step_hooks import attach_progress

__all__ = [
    "TrainingSettings",
    "check_training_settings",
    "measured_decay",
    "measured_speed",
    "training_settings_of",
]

PROBED = 4
"""Number of weights that are measured, largest first; the others follow the same formulas."""

NORMALISING = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """The settings of the user's training loop; 0 if it does not set one.

    Attributes:
        optimizer: the class, such as `torch.optim.SGD`; None if unknown.
        lr: the learning rate.
        weight_decay: the optimizer's weight decay.
        mu: the factor of a proximal term mu/2 |w - w_global|² (FedProx).
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


def training_settings_of(optimizer: Optimizer) -> TrainingSettings:
    """Return the settings of an optimizer's first parameter group."""
    group = optimizer.param_groups[0]
    return TrainingSettings(
        optimizer=type(optimizer),
        lr=float(group.get("lr", 0.0)),
        weight_decay=float(group.get("weight_decay", 0.0)),
    )


def check_training_settings(model: nn.Module, settings: TrainingSettings) -> list[Finding]:
    """Return a finding for each setting: its effect on this model's factors, and what to do.

    Args:
        model: a converted model; not modified.
        settings: the settings of the user's training.
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
            "dense model, and the options clip, speed and decay have no effect"
        )
        return [Finding("note", 'local = "dense"', text)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        speed = sum(map(measured_speed, probed)) / len(probed)
        lines = [*_learning_rate(settings, speed), *_clip(config, plans)]
        lines += _weight_decay(layers, settings, config)
        lines += _mu(settings, speed, any(plan.private_names for plan in plans))
    return lines


def _learning_rate(settings: TrainingSettings, speed: float) -> Iterator[Finding]:
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


def _clip(config: FedParaConfig, plans: list[WeightPlan]) -> Iterator[Finding]:
    if config.clip is None:
        text = "off; factors diverge where dense weights only overshoot: set clip = relative unless"
        yield Finding("note", "clip", f"{text} your own loop clips gradients")
    elif isinstance(config.clip, str):
        share = share_of(config.clip)
        shares = {plan.method.clip for plan in plans} if share is None else {share}
        text = (
            f"bounds how far the gradient can move a factor in a step of SGD, lr |g|, by "
            f"{' or '.join(f'{one:g}' for one in sorted(shares))} of the factor's norm; other "
            f"parameters are left alone, and steps of Adam hardly depend on it"
        )
        yield Finding("note", f"clip {config.clip}", text)
    else:
        text = (
            "bounds the gradient's norm over all parameters, including factors, before every step;"
        )
        yield Finding(
            "note", f"clip {config.clip:g}", f"{text} a bound of your own loop acts on factors too"
        )


def _weight_decay(
    layers: list[FactorisedLayer], settings: TrainingSettings, config: FedParaConfig
) -> Iterator[Finding]:
    if not settings.weight_decay:
        return
    subject, kind = f"weight decay {settings.weight_decay:g}", settings.optimizer
    if kind is None:
        yield Finding("note", subject, "give --optimizer as well: the effect depends on it")
        return
    largest = max(layers, key=lambda layer: max(prod(p.shape) for p in layer.plans.values()))
    factors = len(next(iter(largest.plans.values())).factor_names)
    if not kind.__module__.startswith("torch.optim"):
        yield _finding_of_other(kind, factors, config.decay)
        return
    if issubclass(kind, NORMALISING) and kind is not torch.optim.AdamW:
        share = "1/F of it (F factors) is" if config.decay == "composed" else "all of it is"
        yield Finding(
            "note",
            subject,
            f"{kind.__name__} normalises the decay together with the gradient, so it is not a rate "
            f"of shrinking, even for dense weights; {share} added to the gradient of each factor. "
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
        yield Finding(
            "attention", subject, f"{text}: divide it by that number, or set decay='composed'"
        )


def _mu(settings: TrainingSettings, speed: float, private: bool) -> Iterator[Finding]:
    if not settings.mu:
        return
    text = (
        f"on factors it restrains composed weights as mu = {settings.mu / speed:.2g} would "
        f"restrain dense ones (1/K, K measured {speed:.2f}): set mu = {settings.mu * speed:.2g} to "
        f"keep the balance between the gradient and the proximal term"
    )
    if private:
        text += "; leave private factors out of the term, since they have no global value"
    yield Finding("attention", f"mu {settings.mu:g}", text)


def measured_speed(plan: WeightPlan) -> float:
    """Return K of the shared factors: how far a step moves the weight, dense = 1.

    K = <W(step) - W, -G> / (rate |G|²) to first order, for a random gradient G.
    """
    factors = {
        name: value.requires_grad_(name not in plan.private_names)
        for name, value in initial_factors(plan, seed=0, key="probe").items()
    }
    shared = [value for value in factors.values() if value.requires_grad]
    weight = plan.compose(factors)
    gradient = torch.randn_like(weight)
    pulled = torch.autograd.grad((weight * gradient).sum(), shared)
    # J is the Jacobian of W. A step along -JᵀG changes <W, -G> by |JᵀG|² times the rate.
    return float(sum(p.square().sum() for p in pulled) / gradient.square().sum())


def _finding_of_other(kind: type[torch.optim.Optimizer], factors: int, decay: str) -> Finding:
    name = f"{kind.__name__} is not one of torch's optimizers"
    if decay == "composed":
        return Finding(
            "note",
            "weight decay",
            f"{name}: each of F factors gets its share, weight_decay / F, while it steps. If it "
            f"takes its decay from elsewhere than its parameter groups, divide it by F (up to "
            f"{factors}) yourself",
        )
    return Finding(
        "attention",
        "weight decay",
        f"{name}: its decay acts on each of up to {factors} factors and shrinks composed weights "
        f"up to {factors} times as fast; divide it by that number, or set decay='composed'",
    )


def measured_decay(layer: FactorisedLayer, kind: Callable[..., Optimizer], *, decay: str) -> float:
    """Return how fast weight decay shrinks a composed weight in a step, dense = 1.

    Args:
        layer: of a converted model; a copy of it makes a step with a gradient of zero.
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
