"""The tables: which runs each has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from setting import Setting

__all__ = ["TABLES", "Table"]


@dataclass(frozen=True)
class Table:
    """A table's runs.

    Attributes:
        about: what it shows, and what it costs on one core.
        rows: returns the runs of one seed.
        seeds: of the table.
    """

    about: str
    rows: Callable[[], Iterable[Setting]]
    seeds: Sequence[int] = (0, 1, 2)

    def settings(
        self, seeds: Sequence[int] | None = None, rounds: int | None = None
    ) -> list[Setting]:
        """Return all runs, seed by seed.

        Args:
            seeds: instead of the table's.
            rounds: at most, for a trial.
        """
        found = [row.with_seed(s) for s in seeds or self.seeds for row in self.rows()]
        if rounds is None:
            return found
        return [dataclasses.replace(s, rounds=min(s.rounds, rounds)) for s in found]


SMALL = {"codec": "small"}


def _finetuning() -> Iterable[Setting]:
    """Fine-tuning of a pretrained model on skewed clients."""
    common: dict[str, Any] = {"task": "cifar, pretrained", "pretrained": 600, "rounds": 40}
    frozen = {"base": "frozen", "gamma": 0.1, **SMALL}
    rows: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "full, float32": ({}, {}),
        "full, small": (SMALL, {}),
        "head alone, small": (SMALL, {"trainable": ("*20.*", "*22.*")}),
        "full, small, private head": ({**SMALL, "private": "22.*"}, {}),
        "residual lowrank (LoRA), small": ({"method": "lowrank", **frozen}, {}),
        "residual lowrank, one-sided, small": (
            {"method": "lowrank", "train": "right", **frozen},
            {},
        ),
        "residual fedpara (LoHa), small": ({"method": "fedpara", **frozen}, {}),
        "residual pfedpara, small": ({"method": "pfedpara", **frozen}, {}),
        "residual lowrank, private head, small": (
            {"method": "lowrank", "private": "22.*", **frozen}, {},
        ),
    }  # fmt: skip
    for name, (options, others) in rows.items():
        yield Setting(name=name, options=options, **others, **common)


def _settings() -> Iterable[Setting]:
    """The README's settings beside dense, from a fresh model."""
    fedpara = {"method": "fedpara", "gamma": 0.1}
    yield Setting(name="dense, float32", task="fashion")
    yield Setting(name="dense, small", task="fashion", options=SMALL)
    yield Setting(name="fedpara, no clip", task="fashion", options=fedpara)
    yield Setting(name="fedpara, clip 1", task="fashion", options={**fedpara, "clip": 1.0})
    yield Setting(
        name="fedpara, clip 1, small", task="fashion", options={**fedpara, "clip": 1.0, **SMALL}
    )


TABLES = {
    "settings": Table(
        "Fashion-MNIST, 10 of 100 clients a round: the README's settings beside dense.",
        _settings,
        seeds=(0,),
    ),
    "finetuning": Table(
        "A small VGG, pretrained on one half of CIFAR-10, fine-tuned by 50 skewed clients that "
        "hold the other half: accuracy of the server's model and of the clients' own, and bytes.",
        _finetuning,
    ),
}
