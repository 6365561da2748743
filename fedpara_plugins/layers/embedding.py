"""`nn.Embedding` and `nn.EmbeddingBag` from factors: the table (num, dim) is composed as a matrix.

The padding row keeps torch's meaning. Where the dense layer's row is zero, as torch starts it, the
same row of X1 is zero. Then so is the composed row, whatever the other factors hold: the gradient
is masked there, so that row of X1 never moves, and since it is zero the row moves through no other
factor either. A padding row that somebody filled with other values is composed like every other
row: it gets no gradient of its own, but follows the factors that all rows have in common.

All rows move in every step, also those whose index is in no batch, since they share Y.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedpara_plugins.factors.fast.conditions import without_autocast
from fedpara_plugins.factors.plan import WeightPlan, WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, composed

__all__ = ["EmbeddingMixin", "FactorisedEmbedding", "FactorisedEmbeddingBag"]


class EmbeddingMixin(FactorisedLayer):
    """A table of vectors that is composed at every forward (Proposition 1)."""

    weight = composed()
    padding_idx: int | None

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """The table (num_embeddings, embedding_dim), N(0, 1) by default; one input per output."""
        assert isinstance(dense, (nn.Embedding, nn.EmbeddingBag))
        shape = tuple(dense.weight.shape)
        return [WeightSlot("weight", shape, 1, 1.0, _obstacle(dense))]

    @classmethod
    def from_dense(
        cls, dense: nn.Module, plans: Mapping[str, WeightPlan], **options: Any
    ) -> FactorisedLayer:
        """As for every kind; a padding row that is zero stays zero."""
        layer = super().from_dense(dense, plans, **options)
        assert isinstance(layer, EmbeddingMixin)
        row = layer.padding_idx
        if row is not None and not dense.get_parameter("weight")[row].any():
            layer._zero_padding_row()
        return layer

    def reset_parameters(self) -> None:
        """Draw new factors; the padding row is zero, as in torch."""
        super().reset_parameters()
        self._zero_padding_row()

    def composed_weight(self, weight: str) -> Tensor:
        """As for every kind; autocast leaves a table as it is, and so its rows."""
        with without_autocast(self.factors(weight)["x1"].device.type):
            return super().composed_weight(weight)

    def _zero_padding_row(self) -> None:
        if self.padding_idx is None:
            return
        plan = self.plans["weight"]
        # Methods are of order one or more in their shared operands: one zero row is enough.
        name = next(name for name in plan.factor_names if name not in plan.private_names)
        with torch.no_grad():
            self.factors("weight")[name][self.padding_idx] = 0.0


class FactorisedEmbedding(EmbeddingMixin, nn.Embedding):
    """`nn.Embedding` with a composed table.

    Where a batch has fewer tokens than the table has rows, only the rows of these tokens are
    composed: fifty times faster on one core for 1024 tokens and a table of 30,522 x 768.
    """

    kind = "embedding"
    dense_class = nn.Embedding
    may_skip_composing = True

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """Rows of the composed table: shape (*input.shape, embedding_dim)."""
        # Those who ask for the composed weight, or divide by counts of tokens, need all of it.
        whole = self.must_compose("weight") or self.scale_grad_by_freq
        if whole or input.numel() >= self.num_embeddings:
            return super().forward(input)
        rows = self._rows(input.flatten()).view(*input.shape, self.embedding_dim)
        if self.padding_idx is None:
            return rows
        return torch.where((input == self.padding_idx).unsqueeze(-1), rows.detach(), rows)

    def _rows(self, tokens: Tensor) -> Tensor:
        """The rows of these tokens, shape (tokens, embedding_dim)."""
        factors = {
            name: functional.embedding(tokens, factor) if name[0] == "x" else factor
            for name, factor in self.factors_now("weight").items()
        }
        with without_autocast(tokens.device.type):
            return self.plans["weight"].compose_rows(factors)


class FactorisedEmbeddingBag(EmbeddingMixin, nn.EmbeddingBag):
    """`nn.EmbeddingBag` with a composed table."""

    kind = "embedding_bag"
    dense_class = nn.EmbeddingBag


def _obstacle(dense: nn.Embedding | nn.EmbeddingBag) -> str:
    if dense.max_norm is not None:
        return "max_norm rewrites rows of the table in place, which a composed one does not have"
    if dense.sparse:
        return "sparse=True asks for sparse gradients, which a composed table does not have"
    return ""
