"""Folders in which the library PEFT keeps an adapter: a JSON config, and a safetensors file.

Nothing of PEFT is imported: what its files mean is in its documentation ("PEFT checkpoint format").
`fedpara_plugins.models.peft_export` makes an adapter of a model, and
`fedpara_plugins.models.peft_import` a model of an adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.support import make_private_folder, replace_file
from fedpara_plugins.support.regular_files import check_regular

__all__ = ["MODEL_PREFIX", "PeftAdapter", "read_adapter", "write_adapter"]

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
MODEL_PREFIX = "base_model.model."
"""What stands before a tensor's name: the way from PEFT's wrapper to the user's model."""

MAX_CONFIG = 2**24
"""Most bytes of a config."""


@dataclass(frozen=True)
class PeftAdapter:
    """The content of a folder.

    Attributes:
        config: the JSON object, with the names of PEFT's config classes.
        tensors: by name, such as ``base_model.model.fc.lora_A.weight``.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def write_adapter(adapter: PeftAdapter, folder: Path | str, *, owner_only: bool = False) -> None:
    """Write an adapter's folder, from which ``PeftModel.from_pretrained`` reads it.

    Args:
        adapter: the adapter.
        folder: made if it is missing; files of these names in it are replaced.
        owner_only: whether nobody else may read the files, nor a folder that is made for them.

    Raises:
        OSError: the disk refuses.
    """
    folder = Path(folder)
    if owner_only and not folder.is_dir():
        make_private_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in adapter.tensors.items()}
    text = json.dumps(adapter.config, indent=2, sort_keys=True) + "\n"
    replace_file(folder / TENSORS_FILE, save(tensors, {"format": "pt"}), private=owner_only)
    replace_file(folder / CONFIG_FILE, text.encode(), private=owner_only)


def read_adapter(folder: Path | str) -> PeftAdapter:
    """Read an adapter's folder. Files that would have to be unpickled are refused.

    Raises:
        PayloadError: a file is missing or damaged; or the weights are in a ``.bin`` file.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    config, tensors = folder / CONFIG_FILE, folder / TENSORS_FILE
    if not tensors.exists():
        pickled = " (adapter_model.bin is a pickle: save it again with safe_serialization=True)"
        raise PayloadError(
            f"{folder}: expected {CONFIG_FILE} and {TENSORS_FILE}, as PEFT's save_pretrained "
            f"writes them; there is no {TENSORS_FILE}"
            f"{pickled if tensors.with_suffix('.bin').exists() else ''}"
        )
    for path in (config, tensors):
        check_regular(path)
    try:
        with config.open("rb") as file:
            found = json.loads(file.read(MAX_CONFIG))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"{config}: not the config of an adapter: {error}") from error
    try:
        with safe_open(tensors, framework="pt") as file:
            values = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own class of errors, and others
        raise PayloadError(f"{tensors}: damaged safetensors file: {error}") from error
    return PeftAdapter(found, values)
