"""Memory for composed weights that the next step uses again.

A weight lives from a forward pass to its backward pass and is as large as a dense one. If each step
took its memory anew from the operating system, the pages would cost more than the arithmetic does
for small batches.
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
"""Size in bytes below which torch's allocator keeps freed memory itself."""

_free: dict[int, list[mmap.mmap]] = {}
"""Free memory by size. Lists and dictionaries alone, without a lock: memory may be returned at any
moment, in any thread, and in a process that was forked while another thread was in this module."""


class _Lease(weakref.ref[Any]):
    """Reference that tells when torch has released memory; cheaper than `weakref.finalize`."""

    __slots__ = ("memory",)

    memory: mmap.mmap


_leases: dict[int, _Lease] = {}


def empty(like: Tensor, rows: int, columns: int) -> Tensor:
    """Return an uninitialised tensor of shape (rows, columns).

    Large tensors on the CPU of a POSIX system use returned memory again. Memory is returned when
    nothing refers to it any more: no tensor, no view, no graph. This module never keeps more memory
    than was in use at once.

    Args:
        like: a tensor of the wanted dtype and device.
        rows: the number of rows.
        columns: the number of columns.
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
    # torch refers to this object as long as any tensor uses the memory.
    owner = (ctypes.c_char * size).from_buffer(memory)
    lease = _Lease(owner, _take_back)
    lease.memory = memory
    _leases[id(lease)] = lease
    # No `view`: where several outputs of a node are views, torch refuses to change any in place.
    return torch.frombuffer(owner, dtype=like.dtype).resize_(rows, columns)


def _take_back(lease: _Lease) -> None:
    _leases.pop(id(lease), None)
    _free.setdefault(len(lease.memory), []).append(lease.memory)


def clear() -> None:
    """Return all memory that is not in use to the operating system."""
    _free.clear()
