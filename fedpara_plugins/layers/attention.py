"""Factorised `nn.MultiheadAttention`: its input projections and its output projection."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.factors.fast.conditions import rewritten
from fedpara_plugins.factors.plan import WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, composed
from fedpara_plugins.layers.kept_weights import composed_once, has_kept_weights
from fedpara_plugins.layers.linear import FactorisedLinear
from fedpara_plugins.support.torch_seams import (
    NonDynamicallyQuantizableLinear,
    multi_head_attention_forward,
    own_parameters,
    projects_jointly,
)

__all__ = ["FactorisedAttentionOutput", "FactorisedMultiheadAttention"]

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class FactorisedAttentionOutput(FactorisedLinear, NonDynamicallyQuantizableLinear):
    """The output projection of `nn.MultiheadAttention`, a linear layer with a class of its own.

    It is a kind of its own, so that `to_dense` returns exactly that class.
    """

    kind = "attention output"
    dense_class = NonDynamicallyQuantizableLinear


class FactorisedMultiheadAttention(FactorisedLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with composed projections (Proposition 1).

    The joint projection of queries, keys and values is one weight of shape (3 embed, embed). With
    ``kdim`` or ``vdim`` there are three weights. ``out_proj`` is a layer by itself, converted or
    left dense like any other.
    """

    kind = "attention"
    dense_reset = "_reset_parameters"
    dense_class = nn.MultiheadAttention
    in_proj_weight = composed()
    q_proj_weight = composed()
    k_proj_weight = composed()
    v_proj_weight = composed()

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """Return (3 embed, embed), or (embed, embed), (embed, kdim) and (embed, vdim)."""
        assert isinstance(dense, nn.MultiheadAttention)
        shapes = {
            name: tuple(parameter.shape)
            for name in PROJECTIONS
            if (parameter := own_parameters(dense).get(name)) is not None
        }
        # The default, xavier_uniform_, has this variance.
        return [WeightSlot(name, shape, shape[1], 2 / sum(shape)) for name, shape in shapes.items()]

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute what the dense layer computes, with every weight composed once.

        The dense layer's forward reads a weight up to five times, to decide on its fast path, and
        would compose it each time. Evaluation therefore keeps the weights for the length of that
        forward. Nested tensors go there as well: only the fast path can compute them.
        """
        watched = self.on_composed is not None  # it must see each weight once
        evaluates = not (self.training or torch.is_grad_enabled() or watched or rewritten())
        if evaluates or query.is_nested or key.is_nested or value.is_nested:
            keep = evaluates and not has_kept_weights(self)
            with composed_once(self) if keep else nullcontext():
                return super().forward(
                    query, key, value, key_padding_mask, need_weights, attn_mask,
                    average_attn_weights, is_causal,
                )  # fmt: skip
        turn = self.batch_first and query.dim() == 3
        if turn:
            query, key, value = _batch_second(query, key, value)
        output, weights = self._attend(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (output.transpose(0, 1) if turn else output), weights

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention from composed weights; batches are in the second dimension."""
        return multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.composed_weight("in_proj_weight"),
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            _weight_of(self.out_proj),
            self.out_proj.bias,
            training=self.training,
            use_separate_proj_weight=not projects_jointly(self),
            q_proj_weight=self.composed_weight("q_proj_weight"),
            k_proj_weight=self.composed_weight("k_proj_weight"),
            v_proj_weight=self.composed_weight("v_proj_weight"),
            **options,
        )

    def _reset_parameters(self) -> None:
        """Draw all parameters anew, biases too; the dense layer calls this method."""
        self.reset_parameters()


def _weight_of(layer: nn.Linear) -> Tensor:
    """Return the layer's weight by a call: torch.compile of 2.4 cannot trace descriptors."""
    return layer.composed_weight("weight") if isinstance(layer, FactorisedLayer) else layer.weight


def _batch_second(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Transpose (batch, length, embed) to (length, batch, embed); one tensor stays one tensor.

    torch recognises self-attention by that identity and makes one matrix product instead of three.
    """
    value_turned = value.transpose(0, 1)
    key_turned = value_turned if key is value else key.transpose(0, 1)
    query_turned = key_turned if query is key else query.transpose(0, 1)
    return query_turned, key_turned, value_turned
