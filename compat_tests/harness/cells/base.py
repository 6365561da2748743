"""One entry of the matrix. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Cell"]

LOSSY = ("int8", "balanced")


@dataclass(frozen=True)
class Cell:
    """One entry of the matrix: a real federated run, or a refusal.

    Attributes:
        framework: ``flower``.
        environment: name of the tox environment, or ``local``.
        strategy: a name in `harness.cells.strategies.STRATEGIES`.
        method: the plugin's method.
        codec: the plugin's codec.
        model: one of `harness.oracles.task.MODELS`.
    """

    framework: str
    environment: str
    strategy: str
    method: str
    codec: str
    model: str = "groupnorm"

    @property
    def id(self) -> str:
        """Return the cell's name in test ids and file names, without the environment."""
        return "-".join((self.strategy, self.method, self.codec, self.model))

    @property
    def plain(self) -> bool:
        """Tell whether the plugin has nothing to do."""
        return (self.method, self.codec) == ("none", "none")

    @property
    def exact(self) -> bool:
        """Tell whether the codec is lossless."""
        return self.codec not in LOSSY
