"""One run of a table, as data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Setting"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A task, a method with its options, and how clients train.

    Attributes:
        name: the row of the table.
        task: one of `tasks.TASKS`.
        options: of the plugin, as in its config section; none for dense FedAvg in float32.
        rounds: of the run.
        rate: of SGD on the clients; None for the task's, which is dense's own.
        every: the server's model is evaluated in rounds that this number divides, and the last.
        steps: of SGD of a client in a round; 0 for one pass over its data.
        he: whether a dense model starts with He's variance, as factors without norms do.
        aggregation: the server's rule, one of `aggregation.AGGREGATIONS`.
        seed: of the model, the division of the data, the sampling and the batches.
        pretrained: steps of training before the run, for tasks with such data; 0 for none.
        trainable: name patterns of a dense model's parameters that are trained; () for all.
    """

    name: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 60
    rate: float | None = None
    every: int = 1
    steps: int = 0
    he: bool = False
    aggregation: str = "factors"
    seed: int = 0
    pretrained: int = 0
    trainable: tuple[str, ...] = ()

    def with_seed(self, seed: int) -> Setting:
        """Return the same run with another seed."""
        return dataclasses.replace(self, seed=seed)

    @property
    def key(self) -> str:
        """A short name that no other setting has."""
        fields = self.to_json()
        fields.pop("name")
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not the default's."""
        return {
            f.name: value
            for f in dataclasses.fields(self)
            if (value := getattr(self, f.name)) != f.default and value != {}
        }
