"""A client's round as a context: what SCAFFOLD's and FedDyn's have in common."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from fedpara_plugins.optimizers.named import State, copied
from fedpara_plugins.optimizers.rounds import LocalResult
from fedpara_plugins.optimizers.steps import AddedGradient

__all__ = ["LocalRound"]

Self = TypeVar("Self", bound="LocalRound")


class LocalRound(abc.ABC):
    """Adds a term to the gradient of every step inside the context, and learns from the update.

    Args:
        parameters: that are trained and shared, by name.
        correct: whether the steps are corrected; if not, the client's state is only collected.
        bound: of the update's norm; None for none.
        check: called with each optimizer that holds any of them, before its first step.

    Attributes:
        result: of the round; None until the context is left without an error.
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
        """The parameters that have a variate or a dual."""
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
        """What is to be known before the first step, with the model at the server's x."""
        return

    @abc.abstractmethod
    def _term(self, name: str, parameter: Tensor) -> Tensor | None:
        """What is added to a parameter's gradient; None for nothing."""

    @abc.abstractmethod
    def _finish(self) -> LocalResult:
        """What the round came to; the steps are over."""
