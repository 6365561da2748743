"""Whether a model has normalisation layers, by the names of its modules' classes."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["first_norm"]

NORM = re.compile(r"^(?!_|LocalResponse|CrossMap)\w*Norm(?!Free|[a-z])")
"""BatchNorm2d, LlamaRMSNorm, BatchNormAct2d and PreNorm, but not Normalize, a parametrization such
as _WeightNorm, or LocalResponseNorm, which hardly changes sizes."""


def first_norm(model: nn.Module) -> str | None:
    """Return the name of a model's first module that normalises features; None without any."""
    found = (n for n, module in model.named_modules() if NORM.match(type(module).__name__))
    return next(found, None)
