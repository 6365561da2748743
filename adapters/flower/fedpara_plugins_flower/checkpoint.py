"""Dense checkpoints: safetensors files that the unmodified model loads."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fedpara_plugins import __version__

__all__ = ["write_checkpoint"]


def write_checkpoint(path: Path, state: Mapping[str, Tensor], *, model: str, method: str) -> None:
    """Write a dense state; a reader never sees half a file.

    Args:
        path: of the file; its folder is made.
        state: the dense model's state.
        model: in words, whose model it is; stands in the file's metadata.
        method: that it was trained with.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"model": model, "method": method, "version": __version__}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(
        {name: value.contiguous() for name, value in state.items()},
        partial,
        metadata={"fedpara": json.dumps(about)},
    )
    partial.replace(path)
