"""Weights from their factors as one node of autograd, with hand-written gradients.

The gains over torch's own operations: the scalar multiplies a factor instead of the weight; every
matrix product has the layout that is fastest in the libraries; and backward can compute the
products again, a block of rows at a time, instead of holding them since forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedpara_plugins.factors.fast import buffers, native
from fedpara_plugins.factors.fast.conditions import differentiates
from fedpara_plugins.factors.fast.form import Form
from fedpara_plugins.factors.fast.operands import (
    FactorGradients,
    combine_into,
    operands_of,
    products,
    row_blocks,
)

__all__ = ["Plain", "Recipe", "compose", "differentiable_gradients"]

Plain = Callable[[Sequence[Any]], Tensor]
"""The same computation by torch's own operations, from a sequence of factors. For a linear layer
its inputs come first, and where it takes a bias, the bias or None comes second."""


class Recipe(NamedTuple):
    """How one weight is composed.

    Attributes:
        form: how the operands make the weight.
        plain: the same by torch's own operations, for gradients of gradients.
        recompute: whether to hold only the factors for backward, and compute the products again.
        size: the number of its factors: two for each operand, or three for a kernel.
    """

    form: Form
    plain: Plain
    recompute: bool
    size: int


def compose(recipes: Sequence[Recipe], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Compose several weights in one node of autograd.

    Args:
        recipes: one for each weight.
        factors: x1, y1, t1, x2, ... (no t for a matrix) of one weight after the other, with x
            (m, R), y (n, R), t (R, R, k1, ...); `conditions.may_run` must accept them.

    Returns:
        The weights, each (m, n k).
    """
    weights: tuple[Tensor, ...] = _Compose.apply(recipes, *factors)  # type: ignore[no-untyped-call]
    return weights


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipes: Sequence[Recipe], *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.recipes, ctx.held = recipes, []
        ctx.set_materialize_grads(False)  # no gradients of zeros for weights that nothing used
        weights, beside, at = [], [], 0
        needs = ctx.needs_input_grad[1:]
        for recipe in recipes:
            end = at + recipe.size
            weight, held = _composed(recipe, flat[at:end], True in needs[at:end])
            weights.append(weight)
            ctx.held.append(held and [len(tensors) for tensors in held])
            beside += [tensor for tensors in held or () for tensor in tensors]
            at = end
        ctx.save_for_backward(*flat, *beside)
        return tuple(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)  # read once: a checkpoint does not return them again
        factors = [[*islice(saved, recipe.size)] for recipe in ctx.recipes]
        needs = iter(ctx.needs_input_grad[1:])
        found: list[Tensor | None] = []
        by_hand = not any(g is not None and differentiates(g) for g in gradients)
        for recipe, own, held, gradient in zip(
            ctx.recipes, factors, ctx.held, gradients, strict=True
        ):
            needed = [*islice(needs, len(own))]
            beside = [[*islice(saved, count)] for count in held or ()]
            if gradient is None:
                found += [None] * len(own)
            elif not by_hand:
                found += differentiable_gradients(recipe.plain, own, gradient, needed)
            elif held is None:
                found += native.gradients(recipe.form, own, gradient, needed)
            else:
                found += _gradients(recipe.form, own, gradient, needed, *beside)
        return None, *found


def _composed(
    recipe: Recipe, factors: Sequence[Tensor], needed: bool
) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]] | None]:
    """Compose one weight.

    Returns:
        The weight, and what is held for backward: the products and each `Operand.a`; None if the
        native library composed it, which holds nothing.
    """
    form = recipe.form
    if native.serves(form, factors):
        return native.compose(form, factors), None
    operands = operands_of(form, factors)
    m, columns = operands[0].x.shape[0], operands[0].a.shape[1]
    weight = buffers.empty(operands[0].x, m, columns)
    hold = needed and not recipe.recompute
    keep = [
        buffers.empty(weight, m, columns)
        for _ in operands
        if hold and (form.operands == 2 or form.tanh)
    ]
    for rows in row_blocks(m, columns, weight.element_size()):
        combine_into(weight[rows], form, products(form, operands, rows, keep))
    return weight, (keep, [own.a for own in operands if hold and own.t is not None])


def _gradients(
    form: Form,
    factors: Sequence[Tensor],
    gradient: Tensor,
    needed: Sequence[bool],
    keep: Sequence[Tensor],
    cores: Sequence[Tensor],
) -> list[Tensor | None]:
    gradients = FactorGradients(form, operands_of(form, factors, cores), needed)
    m, columns = gradient.shape
    for rows in row_blocks(m, columns, gradient.element_size()):
        gradients.add(rows, gradient[rows], [k[rows] for k in keep])
    return gradients.result()


def differentiable_gradients(
    plain: Plain, inputs: Sequence[Tensor | None], gradient: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Compute gradients by torch's own operations, as `conditions.differentiates` asks for.

    Args:
        plain: the computation.
        inputs: of it.
        gradient: of its output.
        needed: for each input, whether its gradient is needed; None is returned for the others.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Separate views, since a tensor in two places has a gradient for each of them.
        given = [None if i is None else i.view_as(i) for i in inputs]
        value = plain(given)
    wanted = [i for i, need in zip(given, needed, strict=True) if need and i is not None]
    found = iter(torch.autograd.grad(value, wanted, gradient, create_graph=again))
    return [next(found) if need else None for need in needed]
