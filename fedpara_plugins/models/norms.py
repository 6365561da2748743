"""Whether a model has normalisation layers, by the names of its modules' classes."""

from __future__ import annotations

import re

from torch import nn

__all__ = ["has_norms"]

NORM = re.compile(r"^(?!_|LocalResponse|CrossMap)\w*Norm(?!Free|[a-z])")
"""BatchNorm2d, LlamaRMSNorm, BatchNormAct2d and PreNorm, but not Normalize, a parametrization such
as _WeightNorm, or LocalResponseNorm, which hardly changes sizes."""


def has_norms(model: nn.Module) -> bool:
    """Return whether any module of a model normalises features."""
    return any(NORM.match(type(module).__name__) for module in model.modules())
