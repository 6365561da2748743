"""The last state of the global model, found without access to the strategy."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["FinalState"]

State = dict[str, Tensor]


class FinalState:
    """The last known state of a run's global model, whatever the strategy.

    A strategy keeps the result of its aggregation to itself. The result becomes known when it is
    next sent to clients (for evaluation or training) or loaded into a model on the server. It is
    out of date once clients answer the next training message.
    """

    def __init__(self) -> None:
        self._read: Callable[[], State] | None = None

    def seen(self, state: State) -> None:
        """Take the state that a model on the server has loaded."""
        self._read = lambda: state

    def sent(self, read: Callable[[], State]) -> None:
        """Take the state that is sent to clients.

        Args:
            read: returns the state; called only if it is needed.
        """
        self._read = read

    def trained(self) -> None:
        """Discard the known state, because clients have answered a training message."""
        self._read = None

    def state(self) -> State | None:
        """Return the last global state, or None if it is not known."""
        return self._read() if self._read is not None else None
