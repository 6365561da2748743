"""`nn.MultiheadAttention` from factors: its input projections, and the output projection."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fedpara_plugins.factors.fast.conditions import rewritten
from fedpara_plugins.factors.plan import WeightSlot
from fedpara_plugins.layers.base import FactorisedLayer, composed
from fedpara_plugins.layers.kept_weights import composed_once, holds
from fedpara_plugins.layers.linear import FactorisedLinear

__all__ = ["FactorisedAttentionOutput", "FactorisedMultiheadAttention"]

PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class FactorisedAttentionOutput(FactorisedLinear, NonDynamicallyQuantizableLinear):
    """The output projection inside `nn.MultiheadAttention`, a linear layer with its own class.

    A kind of its own, so that going back to dense gives exactly that class again.
    """

    kind = "attention output"
    dense_class = NonDynamicallyQuantizableLinear


class FactorisedMultiheadAttention(FactorisedLayer, nn.MultiheadAttention):
    """Attention whose projections are composed at every forward (Proposition 1).

    The joint projection of queries, keys and values is one weight of shape (3 embed, embed). With
    ``kdim`` or ``vdim`` each of the three has a weight of its own. ``out_proj`` is a layer of its
    own and is converted as one, or left dense as one.
    """

    kind = "attention"
    dense_class = nn.MultiheadAttention
    in_proj_weight = composed()
    q_proj_weight = composed()
    k_proj_weight = composed()
    v_proj_weight = composed()

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """(3 embed, embed) for all three, or (embed, embed), (embed, kdim), (embed, vdim)."""
        assert isinstance(dense, nn.MultiheadAttention)
        shapes = {
            name: tuple(parameter.shape)
            for name in PROJECTIONS
            if (parameter := dense._parameters.get(name)) is not None
        }
        # xavier_uniform_, the layer's default, has this variance.
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
        """As the dense layer computes it, with every weight composed once.

        The dense layer's own forward reads a weight up to five times, to ask whether its fast path
        is open, and would compose it as often. Evaluation goes there with weights that are kept for
        that long, and so do nested tensors, which only the fast path can compute.
        """
        watched = self.on_composed is not None  # and is to be told of each weight once
        evaluates = not (self.training or torch.is_grad_enabled() or watched or rewritten())
        if evaluates or query.is_nested or key.is_nested or value.is_nested:
            keep = evaluates and not holds(self)
            with composed_once(self) if keep else nullcontext():
                return super().forward(
                    query, key, value, key_padding_mask, need_weights, attn_mask,
                    average_attn_weights, is_causal,
                )  # fmt: skip
        turn = self.batch_first and query.dim() == 3
        if turn:
            query, key, value = _batch_second(query, key, value)
        output, weights = functional.multi_head_attention_forward(
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
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.composed_weight("q_proj_weight"),
            k_proj_weight=self.composed_weight("k_proj_weight"),
            v_proj_weight=self.composed_weight("v_proj_weight"),
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (output.transpose(0, 1) if turn else output), weights

    def _reset_parameters(self) -> None:
        """The dense layer's name for `reset_parameters`; biases start again too."""
        super()._reset_parameters()
        self.reset_parameters()


def _weight_of(layer: nn.Linear) -> Tensor:
    """By a call: the compiler of torch 2.4 cannot trace a descriptor of a class."""
    return layer.composed_weight("weight") if isinstance(layer, FactorisedLayer) else layer.weight


def _batch_second(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(batch, length, embed) to (length, batch, embed); what was one tensor stays one.

    By that identity torch knows self-attention, which needs one matrix product instead of three.
    """
    value_turned = value.transpose(0, 1)
    key_turned = value_turned if key is value else key.transpose(0, 1)
    query_turned = key_turned if query is key else query.transpose(0, 1)
    return query_turned, key_turned, value_turned
