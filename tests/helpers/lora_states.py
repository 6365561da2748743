"""The state of a LoRA adapter, as PEFT names it: many small tensors with long names."""

from __future__ import annotations

import torch
from torch import Tensor


def lora_state(layers: int) -> dict[str, Tensor]:
    """Return the adapter of a transformer's query and value projections, of rank 8."""
    draw = torch.Generator().manual_seed(0)
    return {
        f"base_model.model.model.layers.{i}.self_attn.{part}_proj.lora_{side}.weight": torch.randn(
            (8, 64) if side == "A" else (64, 8), generator=draw
        )
        for i in range(layers)
        for part in "qv"
        for side in "AB"
    }
