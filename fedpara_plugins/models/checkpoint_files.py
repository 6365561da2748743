"""Files of states: safetensors files with a JSON object in the metadata, and torch's own files.

The object stands under ``fedpara``. In a factor checkpoint it holds the `ModelSpec` and the
options, so that the dense model follows from the file alone. Reading never unpickles: torch's own
files are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.stages.dtypes import DTYPES
from fedpara_plugins.support import make_private_folder, replace_file
from fedpara_plugins.support.regular_files import check_regular

__all__ = [
    "METADATA_KEY",
    "Checkpoint",
    "factor_shapes",
    "read_about",
    "read_checkpoint",
    "write_state",
]

METADATA_KEY = "fedpara"
RESERVED_NAME = "__metadata__"
RESERVED_TEXT = (
    "a tensor of a state cannot be called '__metadata__': safetensors, in which checkpoints and "
    "messages are written, keeps that name for itself. Rename the buffer or parameter"
)
MAX_ABOUT = 16 * 2**20
"""Most characters of the JSON object in a file's metadata."""
MAX_PARTS = 2**18
"""Most lists and objects in it: each takes some 100 bytes."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The content of a file.

    Attributes:
        tensors: by name, in the model's order if the file knows it.
        about: the JSON object of the metadata; empty if the file has none.
        spec: the converted model, if the file describes it.
        config: the options of its conversion, if the file has them.
    """

    tensors: dict[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)
    spec: ModelSpec | None = None
    config: FedParaConfig | None = None


def write_state(
    path: Path,
    state: Mapping[str, Tensor],
    about: Mapping[str, Any],
    *,
    owner_only: bool = False,
) -> None:
    """Write a state to a safetensors file; a reader never sees half of it.

    Args:
        path: of the file; its folder is created.
        state: tensors by name.
        about: the JSON object of the metadata.
        owner_only: whether nobody else may read the file, nor a folder that is made for it.

    Raises:
        ConfigError: something else is in the place of a private file's folder.
        PayloadError: safetensors cannot hold a tensor.
        OSError: the disk refuses; an earlier file is unchanged then.
    """
    _check_writable(path, state)
    if not owner_only:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.parent.is_dir():
        make_private_folder(path.parent)
    try:
        # Written here and not by safetensors, whose file has a name and a mode of its own making.
        data = save(_unshared(state), metadata={METADATA_KEY: json.dumps(about)})
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PayloadError(f"{path}: safetensors cannot hold this state: {error}") from error
    replace_file(path, data, private=owner_only)


def _check_writable(path: Path, state: Mapping[str, Tensor]) -> None:
    if RESERVED_NAME in state:
        raise PayloadError(f"{path}: {RESERVED_TEXT}")
    for name, value in state.items():
        if value.dtype not in DTYPES.values():
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
            raise PayloadError(
                f"{path}: tensor {name!r} is of {value.dtype}, which safetensors cannot hold; it "
                f"holds {known}"
            )


def _unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tied weights, whose memory stands under two names: safetensors refuses them."""
    seen: set[int] = set()
    unshared = {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        unshared[name] = value.clone() if memory in seen else value
        seen.add(memory)
    return unshared


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read any safetensors file, or a state dict of torch (.pt, .pth).

    Raises:
        PayloadError: the file is damaged, holds no named tensors, or describes another state.
        OSError: the file cannot be read.
    """
    path = Path(path)
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(9)
    if start[8:9] != b"{":
        return Checkpoint(tensors=_read_torch(path))
    about = read_about(path)
    if "crc32" in about:
        raise PayloadError(f"{path}: a message, not a checkpoint; `fedpara inspect` shows it")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own class of errors, and others
        raise PayloadError(f"{path}: damaged safetensors file: {_first_line(error)}") from error
    if about.get("format") != "factors":
        return Checkpoint(tensors=tensors, about=about)
    return _described(path, tensors, about)


def read_about(path: Path | str) -> dict[str, Any]:
    """Return the JSON object under ``fedpara`` in a file's metadata; empty if there is none.

    Raises:
        PayloadError: the file is no safetensors file, or its metadata is no JSON object.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "{}")
    except OSError:
        raise
    except Exception as error:
        raise PayloadError(f"{path}: damaged safetensors file: {_first_line(error)}") from error
    try:
        parts = text.count("[") + text.count("{")
        about = json.loads(text) if len(text) <= MAX_ABOUT and parts <= MAX_PARTS else None
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"{path}: its metadata {METADATA_KEY!r} is not JSON: {error}") from error
    if not isinstance(about, dict):
        raise PayloadError(f"{path}: its metadata {METADATA_KEY!r} is not a JSON object")
    return about


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old or odd pickles: only the outcome counts
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise PayloadError(
            f"{path}: neither a safetensors file nor one that torch reads with weights_only=True: "
            f"{_first_line(error)}"
        ) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in loaded.items()
    ):
        what = type(loaded).__name__
        if isinstance(loaded, Mapping):
            what += f" with {', '.join(repr(name) for name in list(loaded)[:5])}"
        raise PayloadError(
            f"{path}: expected a state dict, names and tensors; got a {what}. Save "
            f"model.state_dict() alone."
        )
    return dict(loaded)


def _described(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> Checkpoint:
    try:
        spec = ModelSpec.from_json(about["model"], tuple(map(str, about["keys"])))
        config = FedParaConfig.from_mapping(about["config"])
        shapes = factor_shapes(spec)
    except (KeyError, TypeError, AttributeError, ArithmeticError, IndexError, ConfigError) as error:
        raise PayloadError(f"{path}: its description of the model is unsound: {error!r}") from error
    except PayloadError as error:
        raise PayloadError(f"{path}: {error}") from error
    lacking = [key for key in spec.shared_keys if key not in tensors]
    extra = [key for key in tensors if key not in set(spec.keys)]
    wrong = [k for k, shape in shapes.items() if k in tensors and tensors[k].shape != shape]
    if lacking or extra or wrong:
        raise PayloadError(
            f"{path}: its tensors are not those it describes: missing {lacking[:3]}, not expected "
            f"{extra[:3]}, of another shape {wrong[:3]}"
        )
    ordered = {key: tensors[key] for key in spec.keys if key in tensors}
    return Checkpoint(tensors=ordered, about=about, spec=spec, config=config)


def factor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what the dense model lacks, by full name: factors, parts of the head."""
    factors = {
        key: plan.factor_shape(name)
        for weight, plan in spec.weights.items()
        for name, key in spec.factor_keys(weight).items()
    }
    bases = {key: tuple(spec.weights[weight].shape) for weight, key in spec.base_keys.items()}
    return factors | bases | {key: own.shape for key, own in spec.own.items() if own.onto}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
