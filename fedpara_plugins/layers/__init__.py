"""Factorised layers, one file a kind, and weights kept between forwards.

`base` holds the contract of all kinds. The room may import ``factors``, ``config`` and what stands
below them. It offers the built-in kinds (`BUILTIN_LAYERS`), and for kinds of others
`FactorisedLayer`, `composed` and `LazyLayer`.
"""

from __future__ import annotations

from fedpara_plugins.layers.attention import (
    FactorisedAttentionOutput,
    FactorisedMultiheadAttention,
)
from fedpara_plugins.layers.base import FactorisedLayer, composed
from fedpara_plugins.layers.conv import (
    FactorisedConv1d,
    FactorisedConv2d,
    FactorisedConv3d,
    FactorisedConvTranspose1d,
    FactorisedConvTranspose2d,
    FactorisedConvTranspose3d,
)
from fedpara_plugins.layers.embedding import FactorisedEmbedding, FactorisedEmbeddingBag
from fedpara_plugins.layers.kept_weights import composed_once
from fedpara_plugins.layers.lazy import LazyLayer
from fedpara_plugins.layers.linear import FactorisedLinear
from fedpara_plugins.layers.personal import PersonalLinear
from fedpara_plugins.layers.recurrent import FactorisedGRU, FactorisedLSTM

__all__ = [
    "BUILTIN_LAYERS",
    "FactorisedAttentionOutput",
    "FactorisedConv1d",
    "FactorisedConv2d",
    "FactorisedConv3d",
    "FactorisedConvTranspose1d",
    "FactorisedConvTranspose2d",
    "FactorisedConvTranspose3d",
    "FactorisedEmbedding",
    "FactorisedEmbeddingBag",
    "FactorisedGRU",
    "FactorisedLSTM",
    "FactorisedLayer",
    "FactorisedLinear",
    "FactorisedMultiheadAttention",
    "LazyLayer",
    "PersonalLinear",
    "composed",
    "composed_once",
]

BUILTIN_LAYERS: tuple[type[FactorisedLayer] | LazyLayer, ...] = (
    FactorisedLinear,
    FactorisedConv1d,
    FactorisedConv2d,
    FactorisedConv3d,
    FactorisedConvTranspose1d,
    FactorisedConvTranspose2d,
    FactorisedConvTranspose3d,
    FactorisedEmbedding,
    FactorisedEmbeddingBag,
    FactorisedLSTM,
    FactorisedGRU,
    FactorisedMultiheadAttention,
    FactorisedAttentionOutput,
    LazyLayer(
        dense_class="transformers.pytorch_utils:Conv1D",
        kind="fedpara_plugins.layers.transformers_conv1d:FactorisedConv1D",
    ),
)
