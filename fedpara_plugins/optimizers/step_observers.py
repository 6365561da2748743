"""Callbacks around the steps of every optimizer while a context lasts, in any number of threads.

torch's own registries cannot be used for this. It iterates over them at each step, and if a context
is entered or left in another thread meanwhile, the iteration ends with an error.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

# Its hook must run before the hook of this module, so that `clip` bounds the gradient without the
# added term.
import fedpara_plugins.training.step_hooks  # noqa: F401

__all__ = ["StepObserver", "observe_steps"]

StepObserver = Callable[[Optimizer], None]

_lock = threading.Lock()
_observers: tuple[tuple[StepObserver, StepObserver], ...] = ()


@contextmanager
def observe_steps(
    before: StepObserver, after: StepObserver = lambda optimizer: None
) -> Iterator[None]:
    """Call ``before`` and ``after`` around each step of every optimizer, in any thread."""
    global _observers
    entry = before, after
    with _lock:
        _observers = (*_observers, entry)
    try:
        yield
    finally:
        with _lock:
            _observers = tuple(other for other in _observers if other is not entry)


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for before, _ in _observers:
        before(optimizer)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for _, after in _observers:
        after(optimizer)


register_optimizer_step_pre_hook(_before_step)
register_optimizer_step_post_hook(_after_step)
