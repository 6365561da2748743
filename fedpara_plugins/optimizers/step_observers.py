"""Callbacks around the steps of every optimizer while a context lasts, in any number of threads.

They come after the options of `fedpara_plugins.training`, so that `clip` bounds the gradient
without an added term.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.optim import Optimizer

from fedpara_plugins.training import Step, StepObserver, observe_real_steps

__all__ = ["StepCallback", "observe_steps"]

StepCallback = Callable[[Optimizer], None]


@contextmanager
def observe_steps(
    before: StepCallback, after: StepCallback = lambda optimizer: None
) -> Iterator[None]:
    """Call ``before`` and ``after`` around each step of every optimizer, in any thread.

    ``before`` finds the gradients that the step uses: with a closure it is called after the first
    call of the closure, and not at all for a step that a scaler skips.
    """

    def ready(step: Step) -> None:
        if step.evaluations == 1:
            before(step.optimizer)

    def end(step: Step) -> None:
        after(step.optimizer)

    with observe_real_steps(StepObserver(ready=ready, end=end)):
        yield
