"""The optional distribution fedpara-plugins-kernels: how it is found and run in several threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["KernelLibrary", "find_kernels", "run_parts", "split_work"]

API = 3
"""Version of the distribution's functions that this project calls."""

PARALLEL = 4_000_000
"""Multiplications per thread that make it worthwhile to wake a thread."""


class KernelLibrary(NamedTuple):
    """The distribution as it was found.

    Attributes:
        kernels: its module, or None if it is not installed or cannot be used.
        level: of the finding, for `fedpara doctor`.
        text: of the finding.
    """

    kernels: Any
    level: Literal["ok", "note", "attention"]
    text: str


@cache
def find_kernels() -> KernelLibrary:
    """Look for the distribution, once in a process."""
    try:
        import fedpara_plugins_kernels as kernels
    except ModuleNotFoundError:
        text = "not installed; with it weights are composed faster on x86-64"
        return KernelLibrary(None, "note", text)
    except (ImportError, OSError) as error:
        text = f"cannot be loaded, torch composes instead: {error}"
        return KernelLibrary(None, "attention", text)
    if kernels.API != API:
        text = f"{kernels.__version__} does not fit this version: install both from one release"
        return KernelLibrary(None, "attention", text)
    text = f"{kernels.__version__}: composes weights of float32 on the CPU, without tanh"
    return KernelLibrary(kernels, "ok", text)


def split_work(other: int, divided: int, x1: Tensor, x2: Tensor) -> list[tuple[int, int]]:
    """Divide one side of the weight into ranges, at most one for each of torch's threads.

    Args:
        other: the size of the weight's other side.
        divided: the size of the side to divide.
        x1: a factor of the first operand, for its rank.
        x2: a factor of the second operand, for its rank.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [(0, divided)]
    step: int = find_kernels().kernels.COLUMNS
    blocks = -(-divided // step)
    most = other * divided * (x1.shape[1] + x2.shape[1]) // PARALLEL
    count = max(1, min(threads, blocks, most))
    edges = [min(divided, blocks * i // count * step) for i in range(count + 1)]
    return list(pairwise(edges))


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


def run_parts(
    work: Callable[[bytes, int, int], None],
    described: Sequence[bytes],
    parts: Sequence[tuple[int, int]],
) -> None:
    """Run all parts at once; the kernels let other Python threads run.

    Args:
        work: a function of the distribution.
        described: for each part, the data of the work.
        parts: for each part, its range.
    """
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
        wait(waiting)  # they write to memory that the caller frees afterwards
    for one in waiting:
        one.result()
