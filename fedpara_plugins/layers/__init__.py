"""Factorised layers, one file per kind; `base` holds the contract they share."""

from __future__ import annotations

from fedpara_plugins.layers.base import FactorisedLayer, composed
from fedpara_plugins.layers.conv import FactorisedConv2d
from fedpara_plugins.layers.linear import FactorisedLinear

__all__ = [
    "BUILTIN_LAYERS",
    "FactorisedConv2d",
    "FactorisedLayer",
    "FactorisedLinear",
    "composed",
]

BUILTIN_LAYERS: tuple[type[FactorisedLayer], ...] = (FactorisedLinear, FactorisedConv2d)
