"""Weights and linear layers computed by fedpara-plugins-kernels, if that is installed.

The distribution serves the common case only: two operands without tanh, all of float32, on a CPU.
Every other case is computed as if it were not installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from fedpara_plugins.factors.fast import buffers
from fedpara_plugins.factors.fast.form import Form, by_operand
from fedpara_plugins.factors.fast.native_library import find_kernels, run_parts, split_work

__all__ = ["compose", "gradients", "linear", "linear_gradients", "serves"]


def serves(form: Form, factors: Sequence[Tensor]) -> bool:
    """Return whether the functions of this module can be called with these factors.

    Args:
        form: how the operands make the weight.
        factors: x1, y1, t1, x2, ...; of one dtype and device, as `conditions.may_run` has checked.
    """
    first = factors[0]
    if first.dtype is not torch.float32 or not first.is_cpu:
        return False
    if form.operands != 2 or form.tanh or find_kernels().kernels is None:
        return False
    for factor in factors:  # a loop for speed, as in `conditions.may_run`
        if not factor.is_contiguous():
            return False
    return _fit([factor.shape for factor in factors])


def _fit(shapes: Sequence[torch.Size]) -> bool:
    """Return whether shapes fit together. The kernels see addresses only; torch raises errors."""
    first, second = by_operand(shapes, 2)
    (m1, r1), (n1, q1), *core1 = first
    (m2, r2), (n2, q2), *core2 = second
    if m1 != m2 or n1 != n2:
        return False
    if not core1:
        return r1 == q1 and r2 == q2
    (t1,), (t2,) = core1, core2
    return t1[2:] == t2[2:] and t1[:2] == (r1, q1) and t2[:2] == (r2, q2)


class Core:
    """The factors y and t of a convolution's operand in one matrix, as the library needs them.

    Attributes:
        core: t with the rank of x last, (R of y, k R).
        a: the matrix that the rows of x are multiplied by, (n k, R).
    """

    def __init__(self, y: Tensor, t: Tensor) -> None:
        self.y, self.t = y, t
        self.core = t.flatten(2).permute(1, 2, 0).reshape(t.shape[1], -1)
        self.a = (y @ self.core).view(-1, t.shape[0])

    def gradients(self, da: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of y and t from the gradient of `a`; None where that is None."""
        if da is None:
            return [None, None]
        t = self.t
        by_row = da.view(self.y.shape[0], -1)  # (n, k R)
        dt = (self.y.T @ by_row).view(t.shape[1], -1, t.shape[0])
        # With y's few columns first, this is faster than the other order, copy included.
        by_y = (self.core @ by_row.T).T.contiguous()
        return [by_y, dt.permute(2, 0, 1).reshape(t.shape)]


def compose(form: Form, factors: Sequence[Tensor]) -> Tensor:
    """Compose s W1 * (W2 + c), shape (m, n k).

    Args:
        form: of two operands, without tanh.
        factors: x1, y1, t1, x2, y2, t2, or x1, y1, x2, y2; `serves` must accept them.
    """
    matrices, _ = _as_matrices(factors)
    x1, a1, x2, a2 = matrices
    rows, columns = x1.shape[0], a1.shape[0]
    weight = buffers.empty(x1, rows, columns)
    described = find_kernels().kernels.describe(
        (rows, columns),
        *_constants(form),
        weight.data_ptr(),
        0,
        _addresses(x1, a1),
        _addresses(x2, a2),
    )
    parts = split_work(rows, columns, x1, x2)
    run_parts(find_kernels().kernels.compose, [described] * len(parts), parts)
    return weight


def gradients(
    form: Form, factors: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of x1, y1, t1, ...; None for operands that need none.

    Args:
        form: of two operands, without tanh.
        factors: as for `compose`.
        gradient: the weight's gradient, shape (m, n k).
        needed: for each factor, whether its gradient is needed.
    """
    gradient = gradient.contiguous()
    matrices, cores = _as_matrices(_as_saved(factors))
    wanted = [True in own for own in by_operand(needed, 2)]
    by_matrices = _gradients(form, matrices, wanted, gradient.data_ptr(), (0,) * 6)
    if not cores:
        return by_matrices
    dx1, da1, dx2, da2 = by_matrices
    return [dx1, *cores[0].gradients(da1), dx2, *cores[1].gradients(da2)]


def _as_saved(factors: Sequence[Tensor]) -> list[Tensor]:
    """Make factors contiguous, as `serves` requires; hooks on saved tensors may change layouts."""
    return [factor.contiguous() for factor in factors]


def _as_matrices(factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Core]]:
    """Return x1, a1, x2, a2 with W1 = x1 a1ᵀ, ..., and for a convolution what made a1 and a2."""
    if len(factors) == 4:
        return factors, ()
    x1, y1, t1, x2, y2, t2 = factors
    first, second = Core(y1, t1), Core(y2, t2)
    return (x1, first.a, x2, second.a), (first, second)


def linear(form: Form, factors: Sequence[Tensor], inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x Wᵀ + b, shape (..., m); the weight never exists as a whole.

    Args:
        form: of two operands, without tanh.
        factors: of a matrix (m, n); `serves` must accept them.
        inputs: x, shape (..., n).
        bias: b, shape (m,), or None.
    """
    x1, y1, x2, y2 = factors
    (*outer, columns), rows = inputs.shape, x1.shape[0]
    inputs, at = inputs.contiguous(), 0
    if bias is not None:
        bias = bias.contiguous()
        at = bias.data_ptr()
    output = inputs.new_empty(*outer, rows)
    described = find_kernels().kernels.describe(
        (rows, columns),
        *_constants(form),
        0,
        0,
        _addresses(x1, y1),
        _addresses(x2, y2),
        (prod(outer), inputs.data_ptr(), at, output.data_ptr(), 0, 0),
    )
    parts = split_work(columns, rows, x1, x2)
    run_parts(find_kernels().kernels.linear, [described] * len(parts), parts)
    return output


def linear_gradients(
    form: Form,
    factors: Sequence[Tensor],
    inputs: Tensor,
    d_output: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of x, x1, y1, x2, y2 through `linear`; None where none is needed.

    Args:
        form: as for `linear`.
        factors: as for `linear`.
        inputs: x, shape (..., n).
        d_output: the output's gradient, shape (..., m).
        needed: for each of x, x1, y1, x2, y2, whether its gradient is needed.
    """
    d_inputs, at = None, 0
    if needed[0]:
        d_inputs = inputs.new_empty(inputs.shape)
        at = d_inputs.data_ptr()
    inputs, d_output = inputs.contiguous(), d_output.contiguous()
    factors = _as_saved(factors)
    batch = prod(inputs.shape[:-1])
    given = (batch, inputs.data_ptr(), 0, 0, d_output.data_ptr(), at)
    wanted = [True in own for own in by_operand(needed[1:], 2)]
    return [d_inputs, *_gradients(form, factors, wanted, 0, given)]


def _gradients(
    form: Form,
    matrices: Sequence[Tensor],
    wanted: Sequence[bool],
    gradient: int,
    linear: tuple[int, ...],
) -> list[Tensor | None]:
    """Return the gradients of x1, a1, x2, a2; for these see `_as_matrices`."""
    x1, a1, x2, a2 = matrices
    shape = (x1.shape[0], a1.shape[0])
    parts = split_work(*shape, x1, x2)
    dx1, da1, slots1 = _memory(x1, a1, wanted[0], len(parts))
    dx2, da2, slots2 = _memory(x2, a2, wanted[1], len(parts))
    scale, shift = _constants(form)
    describe = find_kernels().kernels.describe
    described = [
        describe(shape, scale, shift, 0, gradient, *slots, linear)
        for slots in zip(slots1, slots2, strict=True)
    ]
    run_parts(find_kernels().kernels.gradients, described, parts)
    return [_sum(dx1), da1, _sum(dx2), da2]


def _memory(
    x: Tensor, a: Tensor, wanted: bool, parts: int
) -> tuple[list[Tensor], Tensor | None, list[tuple[int, int, int, int, int]]]:
    """Allocate one operand's gradients: of x once for each part of the work, of a once.

    Returns:
        Both, and for each part the addresses that the library needs.
    """
    at_x, at_a, _, _, rank = reads = _addresses(x, a)
    if not wanted:
        return [], None, [reads] * parts
    dx, da = [torch.empty_like(x) for _ in range(parts)], torch.empty_like(a)
    at = da.data_ptr()
    return dx, da, [(at_x, at_a, part.data_ptr(), at, rank) for part in dx]


def _sum(parts: Sequence[Tensor]) -> Tensor | None:
    if len(parts) > 1:
        return torch.stack([*parts]).sum(0)
    return parts[0] if parts else None


def _addresses(x: Tensor, a: Tensor) -> tuple[int, int, int, int, int]:
    return x.data_ptr(), a.data_ptr(), 0, 0, x.shape[1]


def _constants(form: Form) -> tuple[float, float]:
    """Return scale and shift of the weight: g1 W1 (g2 W2 + c) = (g1 g2) W1 (W2 + c / g2)."""
    first, second = form.gains
    return first * second * form.bound, (1 / second) if form.plus_one else 0.0
