"""Files of a model: dense checkpoints for others, factor checkpoints that know their model.

Both are safetensors files with one JSON object under ``fedpara`` in the metadata. A factor
checkpoint's holds the `ModelSpec` and the options, so that the dense model can be had from the file
alone. Reading never unpickles; torch's own files are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fedpara_plugins._version import __version__
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, MismatchError, PayloadError
from fedpara_plugins.models.attached_config import config_of
from fedpara_plugins.models.spec import ModelSpec

__all__ = [
    "Checkpoint",
    "check_same_shapes",
    "factor_shapes",
    "load_factors",
    "read_about",
    "read_checkpoint",
    "save_dense",
    "save_factors",
]

METADATA_KEY = "fedpara"
MAX_ABOUT = 16 * 2**20
"""Characters of our JSON in a file's metadata."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        tensors: by name, in the model's order where the file knows it.
        about: the JSON object of the metadata; empty where the file has none.
        spec: the converted model, if the file describes it.
        config: the options it was converted with, if the file has them.
    """

    tensors: dict[str, Tensor]
    about: Mapping[str, Any] = field(default_factory=dict)
    spec: ModelSpec | None = None
    config: FedParaConfig | None = None


# Writing


def save_dense(path: Path | str, state: Mapping[str, Tensor], *, model: str, method: str) -> None:
    """Write a dense state; a reader never sees half a file.

    Args:
        path: of the file; its folder is made.
        state: the dense model's state.
        model: in words, whose model it is; stands in the file's metadata.
        method: that it was trained with.

    Raises:
        PayloadError: a tensor that safetensors cannot hold.
    """
    about = {"format": "dense", "model": model, "method": method, "version": __version__}
    _write(Path(path), state, about)


def save_factors(model: nn.Module, path: Path | str, *, private: bool = True) -> None:
    """Write a converted model's state with all that is needed to make the dense model of it.

    Args:
        model: a converted model; one with nothing factorised is written all the same.
        path: of the file; its folder is made.
        private: also pFedPara's private factors, which otherwise never leave a device; without
            them the file is the shared model W1.

    Raises:
        PayloadError: a tensor that safetensors cannot hold.
    """
    spec, config = ModelSpec.of(model), config_of(model)
    state = {k: v for k, v in model.state_dict().items() if private or k not in spec.private_keys}
    about = {
        "format": "factors",
        "method": config.method,
        "version": __version__,
        "config": config.to_mapping(),
        "keys": list(spec.shared_keys),
        "model": spec.to_json(),
    }
    _write(Path(path), state, about)


def _write(path: Path, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        save_file(_apart(state), partial, metadata={METADATA_KEY: json.dumps(about)})
        partial.replace(path)
    except (ValueError, KeyError, TypeError) as error:
        raise PayloadError(f"{path}: safetensors cannot hold this state: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _apart(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each of its own memory: safetensors refuses tied weights, which stand there twice."""
    seen: set[int] = set()
    apart = {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        place = value.untyped_storage().data_ptr()
        apart[name] = value.clone() if place in seen else value
        seen.add(place)
    return apart


# Reading


def read_checkpoint(path: Path | str) -> Checkpoint:
    """Read a safetensors file or a state dict of torch (.pt, .pth), whoever wrote it.

    Raises:
        PayloadError: damaged, or not a state of named tensors, or a description that is unsound.
        OSError: the file cannot be read.
    """
    path = Path(path)
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
    except Exception as error:  # the library has an error class of its own, and raises others too
        raise PayloadError(f"{path}: damaged safetensors file: {_first_line(error)}") from error
    if about.get("format") != "factors":
        return Checkpoint(tensors=tensors, about=about)
    return _described(path, tensors, about)


def read_about(path: Path | str) -> dict[str, Any]:
    """What the metadata of a safetensors file says under ``fedpara``; empty if it has nothing.

    Raises:
        PayloadError: not a safetensors file, or metadata that is not one JSON object.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            text = (file.metadata() or {}).get(METADATA_KEY, "{}")
    except OSError:
        raise
    except Exception as error:
        raise PayloadError(f"{path}: damaged safetensors file: {_first_line(error)}") from error
    try:
        about = json.loads(text) if len(text) <= MAX_ABOUT else None
    except (ValueError, RecursionError) as error:
        raise PayloadError(f"{path}: its metadata {METADATA_KEY!r} is not JSON: {error}") from error
    if not isinstance(about, dict):
        raise PayloadError(f"{path}: its metadata {METADATA_KEY!r} is not a JSON object")
    return about


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old or odd pickles; what counts is the outcome
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
    """Shapes by their full names of what the dense model has not: factors, parts of the head."""
    factors = {
        key: plan.factor_shape(name)
        for weight, plan in spec.weights.items()
        for name, key in spec.factor_keys(weight).items()
    }
    return factors | {key: own.shape for key, own in spec.own.items() if own.onto}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


# Using


def load_factors(model: nn.Module, path: Path | str) -> None:
    """Load a factor checkpoint into a model that was converted in the same way, strictly.

    Private factors that the file lacks keep the values they have.

    Raises:
        MismatchError: another model, or one converted with other options.
        PayloadError: damaged, or not a factor checkpoint.
    """
    found = read_checkpoint(path)
    spec = ModelSpec.of(model)
    if found.spec is not None:
        found.spec.check_equal(spec, here=f"the file {path}", there="the model")
    state = model.state_dict()
    check_same_shapes(found.tensors, state, optional=spec.private_keys)
    model.load_state_dict({**state, **found.tensors}, strict=True)


def check_same_shapes(
    state: Mapping[str, Tensor | torch.Size],
    wanted: Mapping[str, Tensor],
    *,
    optional: frozenset[str] = frozenset(),
    there: str = "the converted model",
) -> None:
    """Raise for the first name that only one side has or whose shapes differ.

    Args:
        state: tensors or shapes of the file.
        wanted: the model's state.
        optional: names that the file may lack, all of them or none.
        there: what ``wanted`` is, in words.

    Raises:
        MismatchError: names the tensor and both shapes.
    """
    some_private = any(key in state for key in optional)
    for key in [*wanted, *state]:
        if key in optional and not some_private:
            continue
        here = _shape(state.get(key))
        expected = _shape(wanted.get(key))
        if here != expected:
            layer, _, tensor = key.rpartition(".")
            raise MismatchError(
                f"layer {layer!r} differs: {tensor} is {here} in the file and {expected} in "
                f"{there}. Give the model, method and gamma that were used in training."
            )


def _shape(value: Tensor | torch.Size | None) -> str:
    if value is None:
        return "missing"
    return str(tuple(value.shape if isinstance(value, Tensor) else value))
