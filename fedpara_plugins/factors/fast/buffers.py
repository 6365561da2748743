"""Memory for composed weights that is used again in the next step.

A weight lives from a forward pass to its backward pass and is as large as a dense one. Taken from
the operating system anew each time, its pages cost more than its arithmetic does for small batches.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["clear", "empty"]

SMALLEST = 1 << 20
"""Bytes below which torch's allocator keeps memory by itself."""

_free: dict[int, list[mmap.mmap]] = {}
"""By size. Lists and dictionaries alone, without a lock: memory may come back at any moment, in any
thread, and in a process that was forked while another thread was here."""


class _Lease(weakref.ref[Any]):
    """Notices that torch has let go of memory, with less around it than `weakref.finalize` has."""

    __slots__ = ("memory",)

    memory: mmap.mmap


_leases: dict[int, _Lease] = {}


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
    held = (ctypes.c_char * size).from_buffer(memory)
    lease = _Lease(held, _came_back)
    lease.memory = memory
    _leases[id(lease)] = lease
    # Not by `view`: of views that several outputs of a node are, torch refuses to change any.
    return torch.frombuffer(held, dtype=like.dtype).resize_(rows, columns)


def _came_back(lease: _Lease) -> None:
    _leases.pop(id(lease), None)
    _free.setdefault(len(lease.memory), []).append(lease.memory)


def clear() -> None:
    """Give all that is not in use back to the operating system."""
    _free.clear()
