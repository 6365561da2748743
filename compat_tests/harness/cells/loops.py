"""The cells of training loops, as data. Standard library only, for the renderer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["LOOPS", "LOOP_CELLS", "LOOP_ENVIRONMENT", "LOOP_OPTIONS", "LoopCell"]

LOOP_ENVIRONMENT = "core-loops"

LOOPS: Mapping[str, str] = {
    "plain": "`optimizer.step()`",
    "closure": "`optimizer.step(closure)`",
    "lightning": "Lightning `Trainer`",
    "transformers": "Hugging Face `Trainer`",
    "accelerate": "`accelerate`, two batches accumulated",
    "scaler": "`torch.amp.GradScaler`, one step in three skipped",
    "scaler-fused": "`GradScaler`, fused optimizer, one step in three skipped",
    "schedulefree": "`schedulefree`",
}
"""Kinds of training loops, as the page spells them."""

LOOP_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "clip": {"clip": 0.5},
    "relative": {
        **{"clip": "relative:0.002", "variance": "torch"},
        **{"speed": 0.1, "private_speed": 0.1},
    },
    "decay": {"decay": "composed"},
    "schedule": {"schedule": "decoupled", "private_steps": 2},
    "feddyn": {},
}
"""What acts on steps: options of the plugin, and the drift correction for any optimizer."""


@dataclass(frozen=True)
class LoopCell:
    """One training of one model, by a kind of loop and with an option that acts on steps.

    Attributes:
        loop: one of `LOOPS`.
        option: one of `LOOP_OPTIONS`.
    """

    loop: str
    option: str
    framework: str = "loop"
    environment: str = LOOP_ENVIRONMENT

    @property
    def id(self) -> str:
        """Return the cell's name in test ids and file names."""
        return f"{self.loop}-{self.option}"


LOOP_CELLS = tuple(LoopCell(loop, option) for loop in LOOPS for option in LOOP_OPTIONS)
