"""Which state is the global model's last one, seen from the outside of any strategy."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["FinalState"]

State = dict[str, Tensor]


class FinalState:
    """Follows a run's global model without knowing the strategy.

    After the clients have trained, the strategy aggregates in private. Its result shows itself
    when it is next sent to clients (to evaluate, or to train on) or loaded into a model on the
    server; from the next training replies on it is out of date.
    """

    def __init__(self) -> None:
        self._read: Callable[[], State] | None = None

    def seen(self, state: State) -> None:
        """A model on the server has loaded this state."""
        self._read = lambda: state

    def sent(self, read: Callable[[], State]) -> None:
        """This state goes out to clients; ``read`` gives it, if it is wanted at all."""
        self._read = read

    def trained(self) -> None:
        """Clients have answered a training message: what was seen so far is out of date."""
        self._read = None

    def state(self) -> State | None:
        """The last global state, or None if it has not shown itself."""
        return self._read() if self._read is not None else None
