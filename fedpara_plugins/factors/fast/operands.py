"""Operands and factor gradients of a weight, computed for some of its rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fedpara_plugins.factors.compose import core_product
from fedpara_plugins.factors.fast.form import Form, by_operand
from fedpara_plugins.support.torch_seams import tanh_backward

__all__ = ["FactorGradients", "Operand", "combine_into", "operands_of", "products", "row_blocks"]

BLOCK_BYTES = 2 << 20
"""Size of a block of rows whose products are computed together; it stays in the cache."""


class Operand:
    """One operand's factors, ready for products of some of its rows.

    Attributes:
        x: (m, R), times the operand's gain.
        a: the matrix that the rows of x are multiplied by, (R, n k).
    """

    def __init__(
        self, gain: float, x: Tensor, y: Tensor, t: Tensor | None = None, a: Tensor | None = None
    ) -> None:
        self.gain, self.y, self.t = gain, y, t
        self.x = x if gain == 1 else x * gain
        self.a = y.T if t is None else core_product(y, t) if a is None else a

    def gradients(self, dx: Tensor, da: Tensor) -> list[Tensor]:
        """Return the gradients of x, y and (for a kernel) t from those of `x` and `a`."""
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
    """Yield slices that cover all rows: blocks of nearly equal size, of at most `BLOCK_BYTES`.

    Args:
        rows: the number of rows.
        columns: the number of columns.
        element: bytes of an entry.
    """
    count = min(rows, -(-rows * columns * element // BLOCK_BYTES))
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)


def products(
    form: Form, operands: Sequence[Operand], rows: slice, keep: Sequence[Tensor] = ()
) -> list[Tensor]:
    """Compute the operands' products for some rows, tanh included: each (rows, n k).

    Args:
        form: how the operands make the weight.
        operands: of the weight.
        rows: which rows.
        keep: for each operand a tensor of all rows to write into; empty for new tensors.
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


def combine_into(out: Tensor, form: Form, values: Sequence[Tensor]) -> None:
    """Write s W1 or s W1 * (W2 + c) into ``out``, from `products` of the same rows."""
    if form.operands == 1:
        out.copy_(values[0])
    elif form.plus_one:
        torch.addcmul(values[0], values[0], values[1], out=out)
    else:
        torch.mul(values[0], values[1], out=out)
    if form.bound != 1:
        out.mul_(form.bound)


def product_gradient(form: Form, values: Sequence[Tensor], gradient: Tensor, index: int) -> Tensor:
    """Return the gradient of one operand's product, for some rows.

    Args:
        form: how the operands make the weight.
        values: the `products` of these rows.
        gradient: the weight's gradient for these rows.
        index: of the operand.
    """
    result = gradient
    if form.operands == 2:
        other = values[1 - index]
        if form.plus_one and index == 0:
            result = torch.addcmul(gradient, gradient, other)
        else:
            result = gradient * other
    if form.tanh:
        result = tanh_backward(result, values[index])
    return result


def operands_of(
    form: Form, factors: Sequence[Tensor], cores: Sequence[Tensor] = ()
) -> list[Operand]:
    """Make operands of factors.

    Args:
        form: how the operands make the weight.
        factors: x1, y1, t1, x2, ...
        cores: the operands' `Operand.a` if they are known; else empty.
    """
    every = by_operand(factors, form.operands)
    return [
        Operand(gain, *own, *cores[i : i + 1])
        for i, (gain, own) in enumerate(zip(form.gains, every, strict=True))
    ]


class FactorGradients:
    """Gradients of all factors, collected from the weight's gradient for some rows at a time.

    Args:
        form: how the operands make the weight.
        operands: of the weight.
        needed: for each of x1, y1, t1, x2, ..., whether its gradient is needed.
    """

    def __init__(self, form: Form, operands: Sequence[Operand], needed: Sequence[bool]) -> None:
        self.form, self.operands = form, operands
        self.needed = by_operand(needed, form.operands)
        self.a = [own.a.contiguous() for own in operands]
        self.dx: list[list[Tensor]] = [[] for _ in operands]
        self.da: list[Tensor | None] = [None for _ in operands]

    def add(self, rows: slice, gradient: Tensor, values: Sequence[Tensor] = ()) -> None:
        """Add the share of some rows; rows are added in order.

        Args:
            rows: which rows.
            gradient: the weight's gradient for them, (rows, n k).
            values: the `products` of these rows if they are known; else empty.
        """
        if not values and (self.form.operands == 2 or self.form.tanh):
            values = products(self.form, self.operands, rows)
        if self.form.bound != 1:
            gradient = gradient * self.form.bound
        for i, own in enumerate(self.operands):
            if True not in self.needed[i]:
                continue
            d_product = product_gradient(self.form, values, gradient, i)
            x, sofar = own.x[rows], self.da[i]
            # With the few columns of a factor first: the other order takes twice as long.
            self.dx[i].append((self.a[i] @ d_product.T).T)
            self.da[i] = x.T @ d_product if sofar is None else sofar.addmm_(x.T, d_product)
            del d_product  # free it before the next one is made

    def result(self) -> list[Tensor | None]:
        """Return the gradients of x1, y1, t1, x2, ...; autograd drops those that are not needed."""
        found: list[Tensor | None] = []
        for own, needed, dx, da in zip(self.operands, self.needed, self.dx, self.da, strict=True):
            found += [None] * len(needed) if da is None else own.gradients(_joined(dx), da)
        return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])
