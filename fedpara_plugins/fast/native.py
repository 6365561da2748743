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

from fedpara_plugins.fast import buffers
from fedpara_plugins.fast.form import Form

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


def serves(form: Form, factors: Sequence[Tensor | None]) -> bool:
    """Whether `compose` and `gradients` can be called with these factors (x1, y1, t1, x2, ...).

    They are of one dtype and on one device, as `fedpara_plugins.fast.conditions.may_run` has found.
    """
    first = factors[0]
    if first is None or first.dtype is not torch.float32 or not first.is_cpu:
        return False
    if form.operands != 2 or form.tanh or found().kernels is None:
        return False
    if not all([factor is None or factor.is_contiguous() for factor in factors]):  # noqa: C419
        return False
    return _fit(*factors)


def _fit(x1: Any, y1: Any, t1: Any, x2: Any, y2: Any, t2: Any) -> bool:
    """Whether shapes fit together: the kernels see addresses, torch says what is wrong."""
    (m, r1), (n, q1), (m2, r2), (n2, q2) = x1.shape, y1.shape, x2.shape, y2.shape
    if m != m2 or n != n2:
        return False
    if t1 is None or t2 is None:
        return t1 is t2 and r1 == q1 and r2 == q2
    same: bool = t1.shape[2:] == t2.shape[2:]
    return same and t1.shape[:2] == (r1, q1) and t2.shape[:2] == (r2, q2)


class Operand(NamedTuple):
    """One operand's factors as the kernels want them.

    Attributes:
        x: (m, R).
        y: (n, R).
        core: None for a matrix, else t with the rank of x last: (R of y, k R).
        a: (n k, R), what the rows of x are multiplied with.
    """

    x: Tensor
    y: Tensor
    core: Tensor | None
    a: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, t: Tensor | None) -> Operand:
        """From the factors themselves."""
        if t is None:
            return cls(x, y, None, y)
        core = t.flatten(2).permute(1, 2, 0).reshape(t.shape[1], -1)
        return cls(x, y, core, (y @ core).view(-1, t.shape[0]))

    def gradients(
        self, dx: Sequence[Tensor], da: Tensor | None, t: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of x, y and t, from those by `x` (their sum) and `a`; None where nobody wants any."""
        if da is None:
            return None, None, None
        by_x = dx[0] if len(dx) == 1 else torch.stack([*dx]).sum(0)
        if self.core is None or t is None:
            return by_x, da, None
        by_row = da.view(self.y.shape[0], -1)  # (n, k R)
        dt = (self.y.T @ by_row).view(t.shape[1], -1, t.shape[0])
        # With the few columns of y in front: faster than the other way round, the copy included.
        by_y = (self.core @ by_row.T).T.contiguous()
        return by_x, by_y, dt.permute(2, 0, 1).reshape(t.shape)


def compose(form: Form, factors: Sequence[Any]) -> Tensor:
    """Give s W1 or s W1 * (W2 + c), shape (m, n k).

    Args:
        form: of two operands, without tanh.
        factors: x1, y1, t1, x2, y2, t2, as `serves` wants them.
    """
    first, second = _operands(factors)
    weight = buffers.empty(first.x, first.x.shape[0], first.a.shape[0])
    scale, shift = _constants(form)
    described = found().kernels.describe(
        weight.shape, scale, shift, weight.data_ptr(), 0, _read(first), _read(second)
    )
    parts = _parts(weight.shape[0], weight.shape[1], first, second)
    _run(found().kernels.compose, [described] * len(parts), parts)
    return weight


def gradients(
    form: Form, factors: Sequence[Any], gradient: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Of x1, y1, t1, ..., from that by the weight (m, n k); None for operands that need none."""
    gradient = gradient.contiguous()
    return _gradients(form, factors, needed, gradient.data_ptr(), (0,) * 6)


def linear(form: Form, factors: Sequence[Any], inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Give x Wᵀ + b, shape (..., m); the weight never exists as a whole.

    Args:
        form: of two operands, without tanh.
        factors: of a matrix (m, n), as `serves` wants them.
        inputs: x, shape (..., n).
        bias: b, shape (m,), or None.
    """
    first, second = _operands(factors)
    (*outer, columns), rows = inputs.shape, first.x.shape[0]
    inputs, at = inputs.contiguous(), 0
    if bias is not None:
        bias = bias.contiguous()
        at = bias.data_ptr()
    output = inputs.new_empty(*outer, rows)
    scale, shift = _constants(form)
    described = found().kernels.describe(
        (rows, columns),
        scale,
        shift,
        0,
        0,
        _read(first),
        _read(second),
        (prod(outer), inputs.data_ptr(), at, output.data_ptr(), 0, 0),
    )
    parts = _parts(columns, rows, first, second)
    _run(found().kernels.linear, [described] * len(parts), parts)
    return output


def linear_gradients(
    form: Form,
    factors: Sequence[Any],
    inputs: Tensor,
    d_output: Tensor,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Of x, x1, y1, t1, ..., from that by the output of `linear`; see there and `gradients`.

    Args:
        form: see `linear`.
        factors: see `linear`.
        inputs: x, shape (..., n).
        d_output: the gradient by the output, shape (..., m).
        needed: of x, x1, ...
    """
    d_inputs, at = None, 0
    if needed[0]:
        d_inputs = inputs.new_empty(inputs.shape)
        at = d_inputs.data_ptr()
    inputs, d_output = inputs.contiguous(), d_output.contiguous()
    batch = prod(inputs.shape[:-1])
    given = (batch, inputs.data_ptr(), 0, 0, d_output.data_ptr(), at)
    return [d_inputs, *_gradients(form, factors, needed[1:], 0, given)]


def _gradients(
    form: Form,
    factors: Sequence[Any],
    needed: Sequence[bool],
    gradient: int,
    linear: tuple[int, ...],
) -> list[Tensor | None]:
    first, second = _operands(factors)
    shape = (first.x.shape[0], first.a.shape[0])
    parts = _parts(*shape, first, second)
    dx1, da1, slots1 = _memory(first, True in needed[:3], len(parts))
    dx2, da2, slots2 = _memory(second, True in needed[3:], len(parts))
    scale, shift = _constants(form)
    describe = found().kernels.describe
    described = [
        describe(shape, scale, shift, 0, gradient, *slots, linear)
        for slots in zip(slots1, slots2, strict=True)
    ]
    _run(found().kernels.gradients, described, parts)
    return [*first.gradients(dx1, da1, factors[2]), *second.gradients(dx2, da2, factors[5])]


def _memory(
    own: Operand, wanted: bool, parts: int
) -> tuple[list[Tensor], Tensor | None, list[tuple[int, int, int, int, int]]]:
    """For one operand's gradients, by x once for each part of the work, by a once; and `_read`."""
    reads = _read(own)
    if not wanted:
        return [], None, [reads] * parts
    x, a, _, _, rank = reads
    dx = [torch.empty_like(own.x) for _ in range(parts)]
    da = torch.empty_like(own.a)
    at = da.data_ptr()
    return dx, da, [(x, a, part.data_ptr(), at, rank) for part in dx]


def _operands(factors: Sequence[Any]) -> tuple[Operand, Operand]:
    return Operand.of(*factors[:3]), Operand.of(*factors[3:])


def _read(own: Operand) -> tuple[int, int, int, int, int]:
    return own.x.data_ptr(), own.a.data_ptr(), 0, 0, own.x.shape[1]


def _constants(form: Form) -> tuple[float, float]:
    """Of s W1 (W2 + c), with gains: g1 W1 (g2 W2 + c) = (g1 g2) W1 (W2 + c / g2)."""
    first, second = form.gains
    return first * second * form.bound, (1 / second) if form.plus_one else 0.0


def _parts(other: int, divided: int, first: Operand, second: Operand) -> list[tuple[int, int]]:
    """Ranges of the weight's columns, or of its rows: one for each of torch's threads."""
    threads = torch.get_num_threads()
    if threads == 1:
        return [(0, divided)]
    step: int = found().kernels.COLUMNS
    blocks = -(-divided // step)
    most = other * divided * (first.x.shape[1] + second.x.shape[1]) // PARALLEL
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
