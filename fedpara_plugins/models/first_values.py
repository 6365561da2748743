"""What a conversion made of the first values of weights, in words: fits, and starts kept."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from torch import nn

from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.layers.base import full_name

__all__ = ["fit_errors", "fit_summary", "fit_warning", "own_starts", "own_starts_text"]

WARN_ABOVE = 0.1
NAMES_SHOWN = 5


def fit_errors(model: nn.Module) -> dict[str, float]:
    """Return |W - composed| / |W| of each weight that was fitted, by full name."""
    return {
        full_name(name, weight): error
        for name, layer in model.named_modules()
        if isinstance(layer, FactorisedLayer)
        for weight, error in layer.fit_errors.items()
    }


def fit_summary(errors: Mapping[str, float]) -> str:
    """Return one sentence about the errors of a fit; "" without any."""
    if not errors:
        return ""
    worst = max(errors, key=lambda name: errors[name])
    return (
        f"{len(errors)} fitted weights: median relative error {median(errors.values()):.3f}, worst "
        f"{errors[worst]:.3f} ({worst!r})"
    )


def fit_warning(errors: Mapping[str, float]) -> str:
    """Return what a user should know about a coarse fit; "" if every weight is close."""
    if not errors or max(errors.values()) <= WARN_ABOVE:
        return ""
    return (
        f"init='fit': {fit_summary(errors)}. Above {WARN_ABOVE} the converted model is worse than "
        f"the dense one until it is trained: 2 to 25 points of accuracy right after the conversion "
        f"at gamma 0.1, by method (benchmarks/fit.py). Train before you judge it; or raise gamma, "
        f"leave the worst layers dense (exclude), or keep the model dense (method='none') and let "
        f"a codec make the messages small."
    )


def own_starts(model: nn.Module) -> dict[str, float]:
    """Return the standard deviation of each fresh weight that kept the dense one's, by name."""
    return {
        full_name(name, weight): spread
        for name, layer in model.named_modules()
        if isinstance(layer, FactorisedLayer)
        for weight, spread in layer.own_starts.items()
    }


def own_starts_text(starts: Mapping[str, float]) -> str:
    """Return one sentence about fresh weights that kept the size of the dense ones; "" without."""
    if not starts:
        return ""
    shown = [f"{name!r} {spread:.3g}" for name, spread in list(starts.items())[:NAMES_SHOWN]]
    more = f" and {len(starts) - NAMES_SHOWN} more" if len(starts) > NAMES_SHOWN else ""
    return (
        f"{len(starts)} weights have a start of their own, far from the default of their kind of "
        f"layer, and the fresh factors keep its standard deviation: {', '.join(shown)}{more}. The "
        f"option variance sets another"
    )
