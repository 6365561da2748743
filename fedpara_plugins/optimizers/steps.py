"""Change the gradients of whatever optimizer a user's training loop builds, step by step.

Both algorithms here are plain training with one term added to each gradient. The term is added by
hooks that torch calls around every optimizer's step, so a training loop needs no edit. It comes
after what the options ``clip`` and ``decay`` do: those are part of the client's own gradient.
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
from fedpara_plugins.optimizers.watch import watching

__all__ = ["AddedGradient", "Term"]

Term = Callable[[str, Tensor], Tensor | None]
"""From a parameter's name and present value to what is added to its gradient; None for nothing."""


class AddedGradient:
    """Within this context, steps of optimizers that hold these parameters use gradient + term.

    The user's own ``.grad`` is put back after the step. A parameter without a gradient is left
    alone by its optimizer, and by this.

    Args:
        parameters: by name.
        term: what is added.
        check: called with each optimizer that holds any of them, before its first step.

    Attributes:
        steps: how many steps were made.
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
        self._before: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._watch = ExitStack()
        self.steps = 0
        self.rates: dict[str, float] = dict.fromkeys(parameters, 0.0)

    def check_moved(self, update: Mapping[str, Tensor]) -> None:
        """Raise if a parameter has changed though no step of an optimizer was seen.

        Args:
            update: by name, how the parameters have changed inside the context.

        Raises:
            ConfigError: the training loop changes parameters itself.
        """
        unseen = [n for n, rate in self.rates.items() if not rate and bool(update[n].any())]
        if unseen:
            raise ConfigError(
                f"{unseen[0]!r} ({len(unseen)} such parameters) was trained, but by no step of a "
                f"torch optimizer, so its gradients could not be corrected; train this very model "
                f"with a torch.optim optimizer inside the context"
            )

    def __enter__(self) -> AddedGradient:
        self._watch.enter_context(watching(self._add, self._restore))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watch.close()
        for optimizer in list(self._before):
            self._put_back(optimizer)

    @torch.no_grad()
    def _add(self, optimizer: Optimizer) -> None:
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
                self._check(optimizer)
            self._checked.add(optimizer)
        moved = [entry for entry in held if entry[0].grad is not None]
        self.steps += bool(moved)
        before = self._before.setdefault(id(optimizer), [])
        for parameter, name, group in moved:
            self.rates[name] += float(group.get("lr", 0.0))
            added = self._term(name, parameter)
            if added is not None:
                before.append((parameter, parameter.grad))
                parameter.grad = parameter.grad + added

    def _restore(self, optimizer: Optimizer) -> None:
        self._put_back(id(optimizer))

    def _put_back(self, optimizer: int) -> None:
        """Of one optimizer alone: another thread's may be in the middle of its step."""
        for parameter, gradient in self._before.pop(optimizer, []):
            parameter.grad = gradient


def _refuse_closures(optimizer: Optimizer) -> None:
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError(
            "LBFGS computes its gradients inside the step, where nothing can be added to them; "
            "use an optimizer that takes one gradient a step, such as torch.optim.SGD"
        )
