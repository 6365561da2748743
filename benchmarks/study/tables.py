"""The tables: which runs each has."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from setting import Setting
from summary import by_rule, markdown

__all__ = ["TABLES", "Table"]


@dataclass(frozen=True)
class Table:
    """A table's runs.

    Attributes:
        about: what it shows, and what it costs on one core.
        rows: returns the runs of one seed.
        seeds: of the table.
        show: returns the finished runs of a file as Markdown.
    """

    about: str
    rows: Callable[[], Iterable[Setting]]
    seeds: Sequence[int] = (0, 1, 2)
    show: Callable[[Sequence[Setting], Path], str] = markdown

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


FINETUNING: Mapping[str, Any] = {
    "task": "cifar, pretrained",
    "pretrained": 1200,
    "rounds": 12,
    "every": 3,
}
OLD: Mapping[str, Mapping[str, Any]] = {
    "lowrank": {"clip": "none", "variance": "torch", "speed": 0.25},
    "fedpara": {"clip": "none", "variance": "torch", "speed": 0.5},
    "pfedpara": {"clip": "none", "variance": "torch", "speed": 0.25, "private_speed": 0.2},
}
"""Without a clip, with torch's variance and small K: the former defaults."""

FROZEN = {"base": "frozen", "rank": 4, **SMALL}
HEAD = ("head.*",)
KINDS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": (SMALL, {}),
    "head alone": (SMALL, {"trainable": HEAD}),
    "lowrank (LoRA)": ({"method": "lowrank", **FROZEN}, {}),
    "fedpara (LoHa)": ({"method": "fedpara", **FROZEN}, {}),
    "pfedpara": ({"method": "pfedpara", **FROZEN}, {}),
    "one-sided lowrank": ({"method": "lowrank", "train": "right", **FROZEN}, {}),
}
"""What each kind of row trains: options, and other fields."""

TRIED: Mapping[str, tuple[float, ...]] = {
    "full": (0.01, 0.03, 0.1),
    "lowrank (LoRA)": (0.03, 0.1, 0.3),
    "head alone": (0.03, 0.1, 0.3),
}
"""Learning rates that were tried. All rows with factors take that of LoRA."""

RATES: Mapping[str, float] = {
    "full": 0.1,
    "lowrank (LoRA)": 0.1,
    "head alone": 0.3,
}
"""The best of those rates (table `finetuning-rates`)."""


def _finetuning_rates() -> Iterable[Setting]:
    """The learning rates of fine-tuning, the same number for each kind of row."""
    for kind, rates in TRIED.items():
        for rate in rates:
            options, others = KINDS[kind]
            old = OLD.get(options.get("method", "none"), {})
            yield Setting(
                name=f"{kind}, rate {rate}",
                options={**options, **old},
                rate=rate,
                **others,
                **{**FINETUNING, "rounds": 6},
            )


def _finetuning() -> Iterable[Setting]:
    """Fine-tuning of a pretrained model on skewed clients, at the best rate of each kind."""
    old = {**OLD["lowrank"]}
    private = {"private": "head.*"}
    rows: Iterable[tuple[str, str, dict[str, Any]]] = (
        ("full", "float32", {"codec": "none"}),
        ("full", "", {}),
        ("full", "private head", private),
        ("head alone", "", {}),
        ("lowrank (LoRA)", "no clip, K 1/4", old),
        ("lowrank (LoRA)", "no clip, K 1/4, private head", {**old, **private}),
        ("lowrank (LoRA)", "", {}),
        ("lowrank (LoRA)", "share 0.1", {"clip": "relative:0.1"}),
        ("lowrank (LoRA)", "private head", private),
        ("one-sided lowrank", "no clip, K 1/4", old),
        ("one-sided lowrank", "", {}),
        ("fedpara (LoHa)", "no clip, K 1/2", {**OLD["fedpara"]}),
        ("fedpara (LoHa)", "", {}),
        ("fedpara (LoHa)", "share 0.1", {"clip": "relative:0.1"}),
        ("pfedpara", "", {}),
    )
    for kind, more, options in rows:
        yield Setting(
            name=f"{kind}, {more}" if more else kind,
            options={**KINDS[kind][0], **options},
            rate=RATES.get(kind, RATES["lowrank (LoRA)"]),
            **KINDS[kind][1],
            **FINETUNING,
        )


ROUNDS: Mapping[int, tuple[int, int]] = {1: (20, 4), 8: (12, 2), 32: (6, 1), 128: (3, 1)}
"""By local steps of a round: the number of rounds, and how often the model is evaluated."""


def _aggregation() -> Iterable[Setting]:
    """Rules of aggregation for the residual form, by local steps and skew."""
    methods = {
        "lowrank": {"method": "lowrank", "rank": 8, **OLD["lowrank"]},
        "fedpara": {"method": "fedpara", "rank": 4, **OLD["fedpara"]},
    }
    rules: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "mean of factors": ({}, {}),
        "composed": ({}, {"aggregation": "composed"}),
        "product": ({"send": "all"}, {"aggregation": "product"}),
        "one-sided": ({"train": "right"}, {}),
    }
    for split in ("alike", "skewed"):
        for steps, (rounds, every) in ROUNDS.items():
            for method, options in methods.items():
                for rule, (more, others) in rules.items():
                    yield Setting(
                        name=f"{method}, {steps} steps, {rule}",
                        task=f"fashion, turned, {split}",
                        options={"base": "frozen", **SMALL, **options, **more},
                        pretrained=600,
                        rounds=rounds,
                        every=every,
                        steps=steps,
                        rate={"lowrank": 0.2, "fedpara": 0.05}[method],
                        **others,
                    )


def _defaults() -> Iterable[Setting]:
    """The defaults for factors beside what they were, and beside dense."""
    fedpara = {"method": "fedpara", "gamma": 0.1}
    old = {**fedpara, **OLD["fedpara"]}
    for task in ("har", "fashion", "fashion, GroupNorm", "fashion, Dirichlet 0.5"):
        common: dict[str, Any] = {"task": task, "rounds": 40, "every": 2}
        yield Setting(name="dense", **common)
        if task != "fashion, GroupNorm":
            yield Setting(name="dense, He's variance", he=True, **common)
        yield Setting(name="fedpara", options=fedpara, **common)
        for share in (0.01, 0.1) if task == "fashion" else ():
            options = {**fedpara, "clip": f"relative:{share}"}
            yield Setting(name=f"fedpara, share {share}", options=options, **common)
        yield Setting(name="fedpara, small", options={**fedpara, **SMALL}, **common)
        yield Setting(name="fedpara, no clip, K 1/2", options=old, **common)
        yield Setting(name="fedpara, clip 1, K 1/2", options={**old, "clip": 1.0}, **common)


def _personal() -> Iterable[Setting]:
    """The defaults for pFedPara beside what they were, and beside FedPer."""
    pfedpara = {"method": "pfedpara", "gamma": 0.5}
    old = {**pfedpara, **OLD["pfedpara"]}
    for task in ("writers", "two classes"):
        common: dict[str, Any] = {"task": task, "rounds": 60, "every": 10}
        yield Setting(name="FedAvg", **common)
        yield Setting(name="FedPer", options={"private": "3.*"}, **common)
        yield Setting(name="pfedpara", options=pfedpara, **common)
        options: dict[str, Any] = {**pfedpara, "clip": "relative:0.03"}
        yield Setting(name="pfedpara, share 0.03", options=options, **common)
        options = {**pfedpara, "private_speed": 0.2}
        yield Setting(name="pfedpara, private K 0.2", options=options, **common)
        yield Setting(name="pfedpara, no clip, K 1/4", options=old, **common)
        yield Setting(name="pfedpara, clip 1, K 1/4", options={**old, "clip": 1.0}, **common)


TABLES = {
    "defaults": Table(
        "Fashion-MNIST and HAR: what is set where nothing is said, now and before, beside dense.",
        _defaults,
        seeds=(0,),
    ),
    "personal": Table(
        "MNIST by writers and by classes: pFedPara's defaults, now and before, beside FedPer.",
        _personal,
        seeds=(0,),
    ),
    "finetuning-rates": Table(
        "Learning rates for table finetuning: short runs with one seed.",
        _finetuning_rates,
        seeds=(0,),
    ),
    "finetuning": Table(
        "A small VGG, pretrained on one half of CIFAR-10, fine-tuned by 50 skewed clients whose "
        "images are upside down: accuracy of the server's model, of the clients' own, and bytes.",
        _finetuning,
    ),
    "aggregation": Table(
        "Rules of aggregation for the residual form, on turned images of Fashion-MNIST.",
        _aggregation,
        show=by_rule,
    ),
}
