"""Weights composed by the optional distribution fedpara-plugins-kernels, where it is installed.

It serves the common case only: two operands without tanh, all of float32, on a CPU. What it does
not serve goes on as without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from fedpara_plugins.fast import buffers
from fedpara_plugins.fast.form import Form

if TYPE_CHECKING:
    from fedpara_plugins.fast.weight import Operand

__all__ = ["Found", "compose", "found", "gradients", "serves", "without_gains"]

API = 1
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
    """Whether `compose` and `gradients` can be called with these factors (x1, y1, t1, x2, ...)."""
    if form.operands != 2 or form.tanh or found().kernels is None:
        return False
    return all(
        f is None or (f.dtype == torch.float32 and f.device.type == "cpu" and f.is_contiguous())
        for f in factors
    )


def without_gains(form: Form) -> Form:
    """For operands whose gains `compose` and `gradients` apply by themselves."""
    return form._replace(gains=(1.0,) * form.operands)


def compose(
    form: Form, operands: Sequence[Operand], weight: Tensor, *, keep: bool = False
) -> list[Tensor]:
    """Write s W1 * (W2 + c) into ``weight``, shape (m, n k).

    Args:
        form: of two operands, without tanh.
        operands: with their gains left out of `Operand.x`.
        weight: float32 and contiguous.
        keep: the two products for `gradients`, which computes them again without.

    Returns:
        With ``keep`` the two products, in the kernels' own order; else nothing.
    """
    kernels = found().kernels
    task = _task(form, operands, weight)
    task.weight = weight.data_ptr()
    kept = [buffers.empty(weight, 1, kernels.kept(task))] if keep else []
    if keep:
        task.kept = kept[0].data_ptr()
    parts = _parts(operands, weight)
    _run([partial(kernels.compose, task, a, b) for a, b in parts])
    return kept


def gradients(
    form: Form,
    operands: Sequence[Operand],
    gradient: Tensor,
    wanted: Sequence[bool],
    kept: Sequence[Tensor] = (),
) -> list[tuple[Tensor, Tensor] | None]:
    """By x (m, R) and by a (R, n k) of each operand, from that by the weight; None if unwanted."""
    kernels = found().kernels
    gradient = gradient.contiguous()
    parts = _parts(operands, gradient)
    rows, columns = gradient.shape
    dxs: list[list[Tensor]] = [[], []]
    das = [gradient.new_empty(own.a.shape[0], columns) for own in operands]
    tasks = []
    for _ in parts:
        task = _task(form, operands, gradient)
        task.gradient = gradient.data_ptr()
        if kept:
            task.kept = kept[0].data_ptr()
        for i, own in enumerate(operands):
            if wanted[i]:
                dx = gradient.new_empty(rows, kernels.padded(own.x.shape[1]))
                dxs[i].append(dx)
                task.operand[i].dx, task.operand[i].da = dx.data_ptr(), das[i].data_ptr()
        tasks.append(task)
    _run(
        [partial(kernels.gradients, task, a, b) for task, (a, b) in zip(tasks, parts, strict=True)]
    )
    pairs: list[tuple[Tensor, Tensor] | None] = []
    for own, parts_of_dx, da, want in zip(operands, dxs, das, wanted, strict=True):
        if not want:
            pairs.append(None)
            continue
        dx = parts_of_dx[0] if len(parts_of_dx) == 1 else torch.stack(parts_of_dx).sum(0)
        pairs.append((dx[:, : own.x.shape[1]], da))
    return pairs


def _task(form: Form, operands: Sequence[Operand], weight: Tensor) -> Any:
    """The structure that describes a weight; it points into the operands' tensors."""
    kernels = found().kernels
    first, second = form.gains
    # g1 W1 (g2 W2 + c) = (g1 g2) W1 (W2 + c / g2)
    scale = first * second * form.bound
    task = kernels.Weight(*weight.shape, scale, (1 / second) if form.plus_one else 0.0)
    for own, slot in zip(operands, task.operand, strict=True):
        slot.x, slot.a, slot.rank = own.x.data_ptr(), own.a.data_ptr(), own.x.shape[1]
        slot.a_row, slot.a_column = own.a.stride()
    return task


def _parts(operands: Sequence[Operand], weight: Tensor) -> list[tuple[int, int]]:
    """Ranges of columns, one for each of torch's threads."""
    kernels = found().kernels
    columns = weight.shape[1]
    rank = sum(own.x.shape[1] for own in operands)
    step: int = kernels.COLUMNS
    blocks = -(-columns // step)
    most = weight.numel() * rank // PARALLEL
    count = max(1, min(torch.get_num_threads(), blocks, most))
    edges = [min(columns, blocks * i // count * step) for i in range(count + 1)]
    return list(pairwise(edges))


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def _run(calls: Sequence[Callable[[], None]]) -> None:
    """All of them, at once: they let other threads of Python run."""
    if len(calls) == 1:
        return calls[0]()
    key = (os.getpid(), len(calls) - 1)  # threads do not survive a fork
    if key not in _pools:
        _pools[key] = ThreadPoolExecutor(len(calls) - 1, thread_name_prefix="fedpara-kernels")
    waiting = [_pools[key].submit(call) for call in calls[1:]]
    try:
        calls[0]()
    finally:
        wait(waiting)  # they write to memory that is freed after this
    for one in waiting:
        one.result()
    return None
