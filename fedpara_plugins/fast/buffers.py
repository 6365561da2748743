"""Memory for composed weights that is used again in the next step.

A weight lives from a forward pass to its backward pass and is as large as a dense one. Taken from
the operating system anew each time, its pages cost more than its arithmetic does for small batches.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch
from torch import Tensor

__all__ = ["clear", "empty"]

SMALLEST = 1 << 20
"""Bytes below which torch's allocator keeps memory by itself."""

_free: dict[int, list[mmap.mmap]] = {}
"""By size. Lists and dictionaries alone, without a lock: memory may come back at any moment, in any
thread, and in a process that was forked while another thread was here."""


def empty(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised (rows, columns) of the dtype and device of another tensor.

    Large ones on the CPU of a POSIX system use memory again that has come back, and it comes back
    when nothing refers to it any more: no view, no graph. It is never more than was in use at once.
    """
    size = rows * columns * like.element_size()
    if size < SMALLEST or like.device.type != "cpu" or not hasattr(mmap, "MAP_PRIVATE"):
        return like.new_empty(rows, columns)
    try:
        memory = _free.get(size, []).pop()
    except IndexError:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
    # torch holds what it was given as long as any tensor uses it.
    lease = (ctypes.c_char * size).from_buffer(memory)
    weakref.finalize(lease, _came_back, size, memory).atexit = False
    return torch.frombuffer(lease, dtype=like.dtype).view(rows, columns)


def _came_back(size: int, memory: mmap.mmap) -> None:
    _free.setdefault(size, []).append(memory)


def clear() -> None:
    """Give all that is not in use back to the operating system."""
    _free.clear()
