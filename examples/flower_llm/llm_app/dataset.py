"""Sequences of tokens, in place of texts: each client counts in a step of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_app.models import VOCABULARY


def load_data(partition_id: int, size: int = 32, length: int = 16) -> list[dict[str, Tensor]]:
    """Return a client's sequences, with themselves as labels."""
    draw = torch.Generator().manual_seed(partition_id)
    starts = torch.randint(VOCABULARY, (size, 1), generator=draw)
    tokens = (starts + (partition_id + 1) * torch.arange(length)) % VOCABULARY  # [size, length]
    return [{"input_ids": row, "labels": row} for row in tokens]
