"""Be told of every optimizer's steps while a context lasts, in any number of threads at once.

torch's own registers cannot be used for that: it walks them at each step, and a context that is
entered or left in another thread meanwhile ends the walk with an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

# Its hook must be in front of ours, so that clip bounds the gradient and not what is added to it.
import fedpara_plugins.training.step_hooks  # noqa: F401
from fedpara_plugins.support.torch_seams import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

__all__ = ["Watch", "watching"]

Watch = Callable[[Optimizer], None]

_lock = threading.Lock()
_watches: tuple[tuple[Watch, Watch], ...] = ()


@contextmanager
def watching(before: Watch, after: Watch = lambda optimizer: None) -> Iterator[None]:
    """Call ``before`` and ``after`` around each step of each optimizer, whose thread it may be."""
    global _watches
    entry = before, after
    with _lock:
        _watches = (*_watches, entry)
    try:
        yield
    finally:
        with _lock:
            _watches = tuple(other for other in _watches if other is not entry)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for before, _ in _watches:
        before(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for _, after in _watches:
        after(optimizer)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
