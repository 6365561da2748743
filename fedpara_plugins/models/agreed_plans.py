"""Plans and forms that follow from the other side's weights, taken over from a description.

Scale and sizes of factors follow from shape and options, except where values decide: a fitted
weight that is large against its kind's default, or a fresh one that keeps a large standard
deviation of its own, has the plan of a larger variance. The side that the run starts from knows
these values; it writes the plan into every header and factor checkpoint, and the other side takes
it over here before it compares. The same holds for the form, factors or the residual one, where the
option ``base`` leaves it to the weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import isclose, prod

import torch
from torch import nn

from fedpara_plugins.config import VARIANCES, FedParaConfig
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.planning import with_variance
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.base import full_name
from fedpara_plugins.layers.kept_weights import drop_kept_weights
from fedpara_plugins.models.spec import ModelSpec

__all__ = ["adopt_plans", "agreed_config", "specs_for"]


def specs_for(
    model: nn.Module, specs: Iterable[ModelSpec], *, beside: bool = False
) -> list[ModelSpec]:
    """Return those of some specs that may be of a model or of its parts, by names and sizes.

    A run may have several models, of which each has a form of its own. Where two specs name the
    same weight, the one that knows more of the model counts. If none fits, all are returned, since
    parts may be sent under other names.

    Args:
        model: converted or not.
        specs: of the run.
        beside: whether the model is built together with others. None is returned then if none fits:
            an encoder that no message carries does not take the form of the classifier beside it.
    """
    specs = list(specs)
    sizes = {name: value.numel() for name, value in model.state_dict().items()}
    for path, layer in model.named_modules():
        if isinstance(layer, FactorisedLayer):
            sizes |= {full_name(path, w): prod(plan.shape) for w, plan in layer.plans.items()}
    found: list[ModelSpec] = []
    taken: set[str] = set()
    for spec in sorted(specs, key=lambda each: -len(each.weights)):
        fits = all(sizes.get(w) == prod(plan.shape) for w, plan in spec.weights.items())
        if fits and spec.weights and not taken & spec.weights.keys():
            found.append(spec)
            taken |= spec.weights.keys()
    return found or ([] if beside else specs)


def agreed_config(config: FedParaConfig, specs: Iterable[ModelSpec]) -> FedParaConfig:
    """Return the options for a model that takes its values from a run that has begun.

    Its first factors will be replaced, so nothing is fitted, and no weight is asked whether it is
    trained: the specs say in which form the run's weights are. Without one, its own weights decide.

    Args:
        config: the options of this side.
        specs: of the run's models, as far as they are known.
    """
    plans = [plan for spec in specs for plan in spec.weights.values()]
    base = config.base
    if base is None and plans:
        base = "frozen" if any(plan.residual for plan in plans) else "factors"
    return replace(config, base=base).without_values()


def adopt_plans(model: nn.Module, spec: ModelSpec) -> None:
    """Take over the plans of a description that differ from the model's by their variance alone.

    The model's weights stay what they are (under tanh nearly): the shared factors are resized.
    Other differences (method, shape, rank, speeds, tanh) are left for `ModelSpec.check_equal` to
    refuse. Call it before the model's own `ModelSpec` is taken.

    Args:
        model: converted; changed in place.
        spec: of the same model, from a header, a checkpoint or an earlier conversion.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, FactorisedLayer):
            continue
        for weight, plan in layer.plans.items():
            theirs = spec.weights.get(full_name(name, weight))
            if theirs is not None and _differ_by_variance(plan, theirs):
                _adopt(layer, weight, theirs)


def _differ_by_variance(mine: WeightPlan, theirs: WeightPlan) -> bool:
    if mine == theirs or not VARIANCES[0] <= theirs.variance <= VARIANCES[1]:
        return False
    if mine.residual or theirs.residual:  # no value decides about these
        return False
    if (mine.method.name, mine.shape, mine.rank) != (theirs.method.name, theirs.shape, theirs.rank):
        return False
    expected = with_variance(mine, theirs.variance)
    return mine.tanh == theirs.tanh and all(
        # The speeds, from which the numbers follow, were rounded to nine digits.
        isclose(getattr(expected, number), getattr(theirs, number), rel_tol=1e-6)
        for number in ("scale", "factor_std", "private_std")
    )


def _adopt(layer: FactorisedLayer, weight: str, theirs: WeightPlan) -> None:
    mine = layer.plans[weight]
    drop_kept_weights(layer)
    layer.plans[weight] = replace(theirs, name=mine.name, recompute=mine.recompute)
    shared = [f for n, f in layer.factors(weight).items() if n not in mine.private_names]
    gain = (mine.scale / theirs.scale) ** (1 / len(shared))
    with torch.no_grad():
        for factor in shared:
            factor.mul_(gain)
