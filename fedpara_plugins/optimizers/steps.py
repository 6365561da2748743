"""Terms added to the gradients of any optimizer that a user's training loop builds.

SCAFFOLD and FedDyn are plain training with one term added to each gradient. Hooks that torch calls
around every optimizer's step add the term, so a training loop needs no edit. The term is added
after the options ``clip`` and ``decay`` have acted, which belong to the client's own gradient.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.training import Step, StepObserver, observe_real_steps

__all__ = ["AddedGradient", "Term"]

Term = Callable[[str, Tensor], Tensor | None]
"""Maps a parameter's name and present value to the term for its gradient; None for no term."""


class AddedGradient:
    """A context in which optimizer steps on these parameters use gradient + term.

    After the step the user's own ``.grad`` is restored. A parameter without a gradient is skipped
    by its optimizer, and by this context.

    Args:
        parameters: by name.
        term: the term to add.
        check: called with each optimizer that has any of the parameters, before its first step, and
            with what averages parameters around it.

    Attributes:
        steps: number of steps made.
        rates: for each name, the sum of the learning rates of the steps that moved it.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        term: Term,
        check: Callable[[Optimizer], None] | None = None,
    ) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._term = term
        self._check = check
        self._checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()
        # For each optimizer amid a step, its parameters with the user's gradient and the corrected.
        self._before: dict[int, dict[int, tuple[Tensor, Tensor, Tensor]]] = {}
        self._observing = ExitStack()
        self.steps = 0
        self.rates: dict[str, float] = dict.fromkeys(parameters, 0.0)

    def check_moved(self, update: Mapping[str, Tensor]) -> None:
        """Raise if a parameter has changed without a step of an optimizer.

        Args:
            update: by name, the change of the parameters inside the context.

        Raises:
            ConfigError: the training loop changes parameters itself.
        """
        unseen = [n for n, rate in self.rates.items() if not rate and bool(update[n].any())]
        if unseen:
            raise ConfigError(
                f"{unseen[0]!r} ({len(unseen)} such parameters) was trained, but not by a step of "
                f"a torch optimizer, so its gradients could not be corrected; train this very "
                f"model with a torch.optim optimizer inside the context"
            )

    def __enter__(self) -> AddedGradient:
        observer = StepObserver(ready=self._add, end=self._restore)
        self._observing.enter_context(observe_real_steps(observer))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._observing.close()
        for optimizer in list(self._before):
            self._restore_by_id(optimizer)

    @torch.no_grad()
    def _add(self, step: Step) -> None:
        optimizer = step.optimizer
        held = [
            (parameter, self._names[id(parameter)], group)
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._names
        ]
        if not held:
            return
        if optimizer not in self._checked:
            _refuse_closures(optimizer)
            if self._check is not None:
                for one in (optimizer, *step.averaging()):
                    self._check(one)
            self._checked.add(optimizer)
        step.unscale()
        moved = [entry for entry in held if entry[0].grad is not None]
        first = id(optimizer) not in self._before
        self.steps += first and bool(moved)
        before = self._before.setdefault(id(optimizer), {})
        for parameter, name, group in moved:
            if first:
                self.rates[name] += float(group.get("lr", 0.0))
            if id(parameter) in before and before[id(parameter)][2] is parameter.grad:
                continue  # the closure has computed no new gradient
            added = self._term(name, parameter)
            if added is not None:
                own, corrected = parameter.grad, parameter.grad + added
                before[id(parameter)] = parameter, own, corrected
                parameter.grad = corrected

    def _restore(self, step: Step) -> None:
        self._restore_by_id(id(step.optimizer))

    def _restore_by_id(self, optimizer: int) -> None:
        """Restore the gradients of one optimizer; one of another thread may be amid its step."""
        for parameter, gradient, _ in self._before.pop(optimizer, {}).values():
            parameter.grad = gradient


def _refuse_closures(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS takes several gradients and rates per step, and drift corrections count one of "
            "each; use an optimizer that takes one gradient per step, such as torch.optim.SGD"
        )
