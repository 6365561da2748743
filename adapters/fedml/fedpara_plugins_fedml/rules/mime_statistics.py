"""The statistics s of Mime's base algorithms: their use in a step (U), and their update (V).

As in arXiv 2008.03606, with g a gradient, without bias corrections:

- ``sgd``: U = (1 - b) g + b m;  V: m <- (1 - b) g + b m. With b = 0 plain SGD.
- ``adam``: U = ((1 - b1) g + b1 m) / (sqrt(v) + tau);  V: m as above, v <- (1 - b2) g² + b2 v.
- ``rmsprop``: U = g / (sqrt(v) + tau);  V: v as above.
- ``adagrad``: U = g / (sqrt(v) + tau);  V: v <- v + g².

Before the first V, where there is no v yet, the adaptive ones step as SGD: U = g.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedpara_plugins import ConfigError
from fedpara_plugins.optimizers import State

__all__ = ["BASE_ALGORITHMS", "BaseAlgorithm"]

BASE_ALGORITHMS = ("sgd", "adam", "rmsprop", "adagrad")


@dataclass(frozen=True)
class BaseAlgorithm:
    """One base algorithm.

    Attributes:
        kind: one of `BASE_ALGORITHMS`.
        beta_1: b or b1.
        beta_2: b2.
        tau: added to the root.

    Raises:
        ConfigError: if the kind is unknown.
    """

    kind: str
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in BASE_ALGORITHMS:
            raise ConfigError(
                f"Mime: server_optimizer {self.kind!r} is no base algorithm; known: "
                f"{', '.join(BASE_ALGORITHMS)}"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the statistics: m, v, or both."""
        if self.kind == "sgd":
            return ("m",) if self.beta_1 else ()
        return ("m", "v") if self.kind == "adam" else ("v",)

    def direction(self, g: Tensor, s: Mapping[str, Tensor]) -> Tensor:
        """Return U(g, s) for one tensor; s is empty before the first V."""
        if not s and self.kind != "sgd":
            return g
        if self.kind in ("sgd", "adam"):
            m = s.get("m", torch.zeros_like(g))
            g = (1 - self.beta_1) * g + self.beta_1 * m
        return g if self.kind == "sgd" else g / (s["v"].sqrt() + self.tau)

    def updated(self, g: State, s: Mapping[str, State]) -> dict[str, State]:
        """Return V(g, s) for all tensors; {} stands for zeros."""
        after: dict[str, State] = {}
        for kind in self.names:
            held = s.get(kind, {})
            after[kind] = {
                name: self._one(kind, value, held.get(name, torch.zeros_like(value)))
                for name, value in g.items()
            }
        return after

    def _one(self, kind: str, g: Tensor, old: Tensor) -> Tensor:
        if kind == "m":
            return (1 - self.beta_1) * g + self.beta_1 * old
        if self.kind == "adagrad":
            return old + g.square()
        return (1 - self.beta_2) * g.square() + self.beta_2 * old
