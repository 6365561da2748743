"""The model of a cell."""

from __future__ import annotations

from torch import nn

import fedpara_plugins as fedpara
from harness.cells.flower import GAMMA
from harness.oracles.task import TrainingTask


def cell_model(method: str, model: str) -> nn.Module:
    """Build the cell's model as `fedpara_plugins.convert` makes it."""
    net = TrainingTask(model=model).net()
    return net if method == "none" else fedpara.convert(net, method=method, gamma=GAMMA)
