"""The model of a cell."""

from __future__ import annotations

from typing import Any

from torch import nn

import fedpara_plugins as fedpara
from harness.cells.flower import GAMMA
from harness.oracles.task import TrainingTask

SLOW = {"variance": "torch", "speed": 0.25, "private_speed": 0.2}
"""Options with which factors train without a clip: the drift corrections are added after it."""


def slow_options(method: str) -> dict[str, Any]:
    """Return options with which a method's factors train without a clip, at the task's rate."""
    if method == "none":
        return {}
    return {**SLOW, "speed": 0.5} if method == "fedpara" else SLOW


def cell_model(method: str, model: str, **options: Any) -> nn.Module:
    """Build the cell's model as `fedpara_plugins.convert` makes it."""
    net = TrainingTask(model=model).net()
    return net if method == "none" else fedpara.convert(net, method=method, gamma=GAMMA, **options)
