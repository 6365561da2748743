"""Weights from their factors as one node of autograd, with its gradients written by hand.

What it gains over torch's own operations: the scalar multiplies a factor instead of the weight,
every matrix product is laid out as the libraries are fastest at, and the products can be computed
again in backward, a block of rows at a time, instead of being held since forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedpara_plugins.factors.compose import core_product
from fedpara_plugins.factors.fast import buffers, native
from fedpara_plugins.factors.fast.conditions import differentiates
from fedpara_plugins.factors.fast.form import Form, by_operand
from fedpara_plugins.support.torch_seams import tanh_backward

__all__ = [
    "FactorGradients",
    "Plain",
    "Recipe",
    "combined",
    "compose",
    "differentiable",
    "operands_of",
    "products",
    "row_blocks",
]

BLOCK_BYTES = 2 << 20
"""Of a block of rows whose products are computed together: small enough to stay in the cache."""

Plain = Callable[[Sequence[Any]], Tensor]
"""Of factors; for a linear layer its inputs come first, and its bias or None."""


class Recipe(NamedTuple):
    """How one weight is composed.

    Attributes:
        form: how the operands make the weight.
        plain: the same with torch's own operations, for gradients of gradients.
        recompute: hold the factors alone for backward, and compute the products there again.
        size: the number of its factors: two or, for a kernel, three of each operand.
    """

    form: Form
    plain: Plain
    recompute: bool
    size: int


def compose(recipes: Sequence[Recipe], factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Several W, each (m, n k), from x1, y1, t1, x2, ... of each (no t for a matrix).

    Args:
        recipes: of each weight.
        factors: of one weight after the other, x (m, R), y (n, R), t (R, R, k1, ...) of each
            operand; see `may_run`.
    """
    weights: tuple[Tensor, ...] = _Compose.apply(recipes, *factors)  # type: ignore[no-untyped-call]
    return weights


class Operand:
    """One operand's factors, ready for products of some of its rows.

    Attributes:
        x: (m, R), times the operand's gain.
        a: (R, n k), what the rows of x are multiplied with.
    """

    def __init__(
        self, gain: float, x: Tensor, y: Tensor, t: Tensor | None = None, a: Tensor | None = None
    ) -> None:
        self.gain, self.y, self.t = gain, y, t
        self.x = x if gain == 1 else x * gain
        self.a = y.T if t is None else core_product(y, t) if a is None else a

    def gradients(self, dx: Tensor, da: Tensor) -> list[Tensor]:
        """Of x, y and (for a kernel) t, from those by `x` and `a`."""
        if self.gain != 1:
            dx = dx * self.gain
        if self.t is None:
            return [dx, da.T]
        rank, n = self.t.shape[0], self.y.shape[0]
        by_row = da.view(rank, n, -1).transpose(0, 1).reshape(n, -1)  # (n, R k)
        core = self.t.flatten(2).transpose(0, 1).reshape(rank, -1)  # (R of y, R of x, k)
        dt = (self.y.T @ by_row).view(rank, *self.t.shape[:1], *self.t.shape[2:]).transpose(0, 1)
        return [dx, by_row @ core.T, dt]


def row_blocks(rows: int, columns: int, element: int) -> Iterator[slice]:
    """Slices of at most `BLOCK_BYTES` that cover all rows, in blocks of nearly equal size."""
    count = min(rows, -(-rows * columns * element // BLOCK_BYTES))
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)


def products(
    form: Form, operands: Sequence[Operand], rows: slice, keep: Sequence[Tensor] = ()
) -> list[Tensor]:
    """What the operands give for some rows, tanh included: each (rows, n k).

    With ``keep`` they are written to these rows of tensors that hold all of them.
    """
    if keep:
        values = [
            torch.mm(own.x[rows], own.a, out=k[rows]) for own, k in zip(operands, keep, strict=True)
        ]
    else:
        values = [own.x[rows] @ own.a for own in operands]
    if form.tanh:
        for value in values:
            value.tanh_()
    return values


def combined(form: Form, values: Sequence[Tensor], out: Tensor) -> None:
    """Write s W1 or s W1 * (W2 + c) of some rows into ``out``."""
    if form.operands == 1:
        out.copy_(values[0])
    elif form.plus_one:
        torch.addcmul(values[0], values[0], values[1], out=out)
    else:
        torch.mul(values[0], values[1], out=out)
    if form.bound != 1:
        out.mul_(form.bound)


def pulled_back(form: Form, values: Sequence[Tensor], gradient: Tensor, index: int) -> Tensor:
    """The weight's gradient for some rows, taken back to the product of one operand."""
    pulled = gradient
    if form.operands == 2:
        other = values[1 - index]
        if form.plus_one and index == 0:
            pulled = torch.addcmul(gradient, gradient, other)
        else:
            pulled = gradient * other
    if form.tanh:
        pulled = tanh_backward(pulled, values[index])
    return pulled


def operands_of(
    form: Form, factors: Sequence[Tensor], cores: Sequence[Tensor] = ()
) -> list[Operand]:
    """From flat x1, y1, t1, x2, ..., and what `Operand.a` was if that is known."""
    every = by_operand(factors, form.operands)
    return [
        Operand(gain, *own, *cores[i : i + 1])
        for i, (gain, own) in enumerate(zip(form.gains, every, strict=True))
    ]


class _Compose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recipes: Sequence[Recipe], *flat: Tensor) -> tuple[Tensor, ...]:
        ctx.recipes, ctx.held = recipes, []
        ctx.set_materialize_grads(False)  # weights that nothing used need no gradients of zeros
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
        saved = iter(ctx.saved_tensors)  # once: a checkpoint gives them no second time
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
                found += differentiable(recipe.plain, own, gradient, needed)
            elif held is None:
                found += native.gradients(recipe.form, own, gradient, needed)
            else:
                found += _gradients(recipe.form, own, gradient, needed, *beside)
        return None, *found


def _composed(
    recipe: Recipe, factors: Sequence[Tensor], needed: bool
) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]] | None]:
    """The weight, and what is held for backward: products and `Operand.a`; None by the kernels."""
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
        combined(form, products(form, operands, rows, keep), weight[rows])
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


class FactorGradients:
    """Collects the gradients of all factors from that of the weight, some rows at a time."""

    def __init__(self, form: Form, operands: Sequence[Operand], needed: Sequence[bool]) -> None:
        self.form, self.operands = form, operands
        self.needed = by_operand(needed, form.operands)
        self.a = [own.a.contiguous() for own in operands]
        self.dx: list[list[Tensor]] = [[] for _ in operands]
        self.da: list[Tensor | None] = [None for _ in operands]

    def add(self, rows: slice, gradient: Tensor, values: Sequence[Tensor] = ()) -> None:
        """The weight's gradient (rows, n k), and `products` of these rows if they are known."""
        if not values and (self.form.operands == 2 or self.form.tanh):
            values = products(self.form, self.operands, rows)
        if self.form.bound != 1:
            gradient = gradient * self.form.bound
        for i, own in enumerate(self.operands):
            if True not in self.needed[i]:
                continue
            pulled = pulled_back(self.form, values, gradient, i)
            x, sofar = own.x[rows], self.da[i]  # blocks come in order
            # With the few columns of a factor in front: half as fast the other way round.
            self.dx[i].append((self.a[i] @ pulled.T).T)
            self.da[i] = x.T @ pulled if sofar is None else sofar.addmm_(x.T, pulled)
            del pulled  # before the next one is made

    def result(self) -> list[Tensor | None]:
        """Of x1, y1, t1, x2, ...; torch drops those that nobody asked for."""
        found: list[Tensor | None] = []
        for own, needed, dx, da in zip(self.operands, self.needed, self.dx, self.da, strict=True):
            found += [None] * len(needed) if da is None else own.gradients(_joined(dx), da)
        return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def differentiable(
    plain: Plain, inputs: Sequence[Tensor | None], gradient: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients by torch's own operations: see `conditions.differentiates`."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Each by itself: one tensor in two places has a gradient in each.
        given = [None if i is None else i.view_as(i) for i in inputs]
        value = plain(given)
    wanted = [i for i, need in zip(given, needed, strict=True) if need and i is not None]
    found = iter(torch.autograd.grad(value, wanted, gradient, create_graph=again))
    return [next(found) if need else None for need in needed]
