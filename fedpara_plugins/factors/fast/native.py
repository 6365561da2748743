"""Weights composed by the optional distribution fedpara-plugins-kernels, where it is installed.

It serves the common case only: two operands without tanh, all of float32, on a CPU. What it does
not serve goes on as without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedpara_plugins.factors.fast import buffers
from fedpara_plugins.factors.fast.form import Form, by_operand

__all__ = ["Found", "compose", "found", "gradients", "linear", "linear_gradients", "serves"]

API = 3
"""Of the distribution's functions that this module knows how to call."""

PARALLEL = 4_000_000
"""Multiplications of one product from which on it is worth to wake further threads."""


class Found(NamedTuple):
    """The distribution, as it was found: ``level`` and ``text`` are for `fedpara doctor`."""

    kernels: Any
    level: Literal["ok", "note", "attention"]
    text: str


@cache
def found() -> Found:
    """Look for it, once; ``kernels`` is None where it is not there or cannot be used."""
    try:
        import fedpara_plugins_kernels as kernels
    except ModuleNotFoundError:
        return Found(None, "note", "not installed; with it weights are composed faster on x86-64")
    except (ImportError, OSError) as error:
        return Found(None, "attention", f"cannot be loaded, torch composes instead: {error}")
    if kernels.API != API:
        text = f"{kernels.__version__} does not fit this version: install both from one release"
        return Found(None, "attention", text)
    text = f"{kernels.__version__}: composes weights of float32 on the CPU, without tanh"
    return Found(kernels, "ok", text)


def serves(form: Form, factors: Sequence[Tensor]) -> bool:
    """Whether `compose` and `gradients` can be called with these factors (x1, y1, t1, x2, ...).

    They are of one dtype and on one device, as `conditions.may_run` has found.
    """
    first = factors[0]
    if first.dtype is not torch.float32 or not first.is_cpu:
        return False
    if form.operands != 2 or form.tanh or found().kernels is None:
        return False
    for factor in factors:  # a loop, as there
        if not factor.is_contiguous():
            return False
    return _fit([factor.shape for factor in factors])


def _fit(shapes: Sequence[torch.Size]) -> bool:
    """Whether shapes fit together: the kernels see addresses, torch says what is wrong."""
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
    """A kernel's y and t as the kernels want them, together.

    Attributes:
        core: t with the rank of x last, (R of y, k R).
        a: (n k, R), what the rows of x are multiplied with.
    """

    def __init__(self, y: Tensor, t: Tensor) -> None:
        self.y, self.t = y, t
        self.core = t.flatten(2).permute(1, 2, 0).reshape(t.shape[1], -1)
        self.a = (y @ self.core).view(-1, t.shape[0])

    def gradients(self, da: Tensor | None) -> list[Tensor | None]:
        """Of y and t, from that by `a`; None if nobody wants any."""
        if da is None:
            return [None, None]
        t = self.t
        by_row = da.view(self.y.shape[0], -1)  # (n, k R)
        dt = (self.y.T @ by_row).view(t.shape[1], -1, t.shape[0])
        # With the few columns of y in front: faster than the other way round, the copy included.
        by_y = (self.core @ by_row.T).T.contiguous()
        return [by_y, dt.permute(2, 0, 1).reshape(t.shape)]


def compose(form: Form, factors: Sequence[Tensor]) -> Tensor:
    """Give s W1 or s W1 * (W2 + c), shape (m, n k).

    Args:
        form: of two operands, without tanh.
        factors: x1, y1, t1, x2, y2, t2, or x1, y1, x2, y2, as `serves` wants them.
    """
    matrices, _ = _as_matrices(factors)
    x1, a1, x2, a2 = matrices
    rows, columns = x1.shape[0], a1.shape[0]
    weight = buffers.empty(x1, rows, columns)
    described = found().kernels.describe(
        (rows, columns), *_constants(form), weight.data_ptr(), 0, _read(x1, a1), _read(x2, a2)
    )
    parts = _parts(rows, columns, x1, x2)
    _run(found().kernels.compose, [described] * len(parts), parts)
    return weight


def gradients(
    form: Form, factors: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Of x1, y1, t1, ..., from that by the weight (m, n k); None for operands that need none."""
    gradient = gradient.contiguous()
    matrices, cores = _as_matrices(_as_saved(factors))
    wanted = [True in own for own in by_operand(needed, 2)]
    by_matrices = _gradients(form, matrices, wanted, gradient.data_ptr(), (0,) * 6)
    if not cores:
        return by_matrices
    dx1, da1, dx2, da2 = by_matrices
    return [dx1, *cores[0].gradients(da1), dx2, *cores[1].gradients(da2)]


def _as_saved(factors: Sequence[Tensor]) -> list[Tensor]:
    """As `serves` has seen them: a hook on saved tensors may give them back in another layout."""
    return [factor.contiguous() for factor in factors]


def _as_matrices(factors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Core]]:
    """x1, a1, x2, a2 with W1 = x1 a1ᵀ, ...; and what has made a kernel's a."""
    if len(factors) == 4:
        return factors, ()
    x1, y1, t1, x2, y2, t2 = factors
    first, second = Core(y1, t1), Core(y2, t2)
    return (x1, first.a, x2, second.a), (first, second)


def linear(form: Form, factors: Sequence[Tensor], inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Give x Wᵀ + b, shape (..., m); the weight never exists as a whole.

    Args:
        form: of two operands, without tanh.
        factors: of a matrix (m, n), as `serves` wants them.
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
    described = found().kernels.describe(
        (rows, columns),
        *_constants(form),
        0,
        0,
        _read(x1, y1),
        _read(x2, y2),
        (prod(outer), inputs.data_ptr(), at, output.data_ptr(), 0, 0),
    )
    parts = _parts(columns, rows, x1, x2)
    _run(found().kernels.linear, [described] * len(parts), parts)
    return output


def linear_gradients(
    form: Form,
    factors: Sequence[Tensor],
    inputs: Tensor,
    d_output: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Of x, x1, y1, x2, y2, from that by the output of `linear`; see there and `gradients`.

    Args:
        form: see `linear`.
        factors: see `linear`.
        inputs: x, shape (..., n).
        d_output: the gradient by the output, shape (..., m).
        needed: of x, x1, y1, ...
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
    """Of x1, a1, x2, a2: see `_as_matrices`."""
    x1, a1, x2, a2 = matrices
    shape = (x1.shape[0], a1.shape[0])
    parts = _parts(*shape, x1, x2)
    dx1, da1, slots1 = _memory(x1, a1, wanted[0], len(parts))
    dx2, da2, slots2 = _memory(x2, a2, wanted[1], len(parts))
    scale, shift = _constants(form)
    describe = found().kernels.describe
    described = [
        describe(shape, scale, shift, 0, gradient, *slots, linear)
        for slots in zip(slots1, slots2, strict=True)
    ]
    _run(found().kernels.gradients, described, parts)
    return [_sum(dx1), da1, _sum(dx2), da2]


def _memory(
    x: Tensor, a: Tensor, wanted: bool, parts: int
) -> tuple[list[Tensor], Tensor | None, list[tuple[int, int, int, int, int]]]:
    """For one operand's gradients, by x once for each part of the work, by a once; and `_read`."""
    at_x, at_a, _, _, rank = reads = _read(x, a)
    if not wanted:
        return [], None, [reads] * parts
    dx, da = [torch.empty_like(x) for _ in range(parts)], torch.empty_like(a)
    at = da.data_ptr()
    return dx, da, [(at_x, at_a, part.data_ptr(), at, rank) for part in dx]


def _sum(parts: Sequence[Tensor]) -> Tensor | None:
    if len(parts) > 1:
        return torch.stack([*parts]).sum(0)
    return parts[0] if parts else None


def _read(x: Tensor, a: Tensor) -> tuple[int, int, int, int, int]:
    return x.data_ptr(), a.data_ptr(), 0, 0, x.shape[1]


def _constants(form: Form) -> tuple[float, float]:
    """Of s W1 (W2 + c), with gains: g1 W1 (g2 W2 + c) = (g1 g2) W1 (W2 + c / g2)."""
    first, second = form.gains
    return first * second * form.bound, (1 / second) if form.plus_one else 0.0


def _parts(other: int, divided: int, x1: Tensor, x2: Tensor) -> list[tuple[int, int]]:
    """Ranges of the weight's columns, or of its rows: one for each of torch's threads."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [(0, divided)]
    step: int = found().kernels.COLUMNS
    blocks = -(-divided // step)
    most = other * divided * (x1.shape[1] + x2.shape[1]) // PARALLEL
    count = max(1, min(threads, blocks, most))
    edges = [min(divided, blocks * i // count * step) for i in range(count + 1)]
    return list(pairwise(edges))


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _run(
    work: Callable[[bytes, int, int], None],
    described: Sequence[bytes],
    parts: Sequence[tuple[int, int]],
) -> None:
    """All parts at once: the kernels let other threads of Python run."""
    if len(parts) == 1:
        work(described[0], *parts[0])
        return
    (first, *others) = zip(described, parts, strict=True)
    key = (os.getpid(), len(others))  # threads do not survive a fork
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(len(others), thread_name_prefix="fedpara-kernels")
    waiting = [_pools[key].submit(work, one, *part) for one, part in others]
    try:
        work(first[0], *first[1])
    finally:
        wait(waiting)  # they write to memory that is freed after this
    for one in waiting:
        one.result()
