"""A client's round as a context: the common part of SCAFFOLD and FedDyn."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from fedpara_plugins.optimizers.named_tensors import State, copied
from fedpara_plugins.optimizers.rounds import LocalResult
from fedpara_plugins.optimizers.steps import AddedGradient

__all__ = ["LocalRound"]

Self = TypeVar("Self", bound="LocalRound")


class LocalRound(abc.ABC):
    """A context that adds a term to the gradient of every step inside it.

    Args:
        parameters: the trained, shared parameters by name.
        correct: whether the steps are corrected; if not, the variate or dual is only collected.
        bound: on the update's norm; None for no bound.
        check: called with each optimizer that has any of the parameters, before its first step.

    Attributes:
        result: the round's result; None until the context is left without an error.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        correct: bool,
        bound: float | None,
        check: Callable[[Optimizer], None] | None = None,
    ) -> None:
        self._parameters = dict(parameters)
        self._correct = correct
        self._bound = bound
        self._start: State = {}
        self._steps = AddedGradient(self._parameters, self._term, check)
        self.result: LocalResult | None = None

    @property
    def names(self) -> frozenset[str]:
        """Return the names of the parameters that have a variate or a dual."""
        return frozenset(self._parameters)

    def __enter__(self: Self) -> Self:
        self._start = copied(self._parameters)
        self._prepare()
        self._steps.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._steps.__exit__(kind, error, traceback)
        if error is None:
            self.result = self._finish()

    def _prepare(self) -> None:
        """Compute what the first step needs, with the model at the server's x."""
        return

    @abc.abstractmethod
    def _term(self, name: str, parameter: Tensor) -> Tensor | None:
        """Return the tensor to add to a parameter's gradient; None for nothing."""

    @abc.abstractmethod
    def _finish(self) -> LocalResult:
        """Return the result of the round, after its steps."""
