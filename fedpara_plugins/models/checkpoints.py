"""Checkpoints of a model: dense ones for others, and factor ones that describe their model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fedpara_plugins._version import __version__
from fedpara_plugins.errors import MismatchError
from fedpara_plugins.models.agreed_plans import adopt_plans
from fedpara_plugins.models.attached_config import config_of
from fedpara_plugins.models.checkpoint_files import read_checkpoint, write_state
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.wrapper_names import wrapper_hint

__all__ = ["check_same_shapes", "load_factors", "save_dense", "save_factors"]


def save_dense(
    path: Path | str,
    state: Mapping[str, Tensor],
    *,
    model: str,
    method: str,
    owner_only: bool = False,
) -> None:
    """Write a dense state to a safetensors file; a reader never sees half of it.

    Args:
        path: of the file; its folder is created.
        state: the dense model's state.
        model: whose model it is, in words, for the file's metadata.
        method: the method that it was trained with.
        owner_only: whether nobody else may read the file (mode 0600), nor a folder that is made for
            it: for a client's own model.

    Raises:
        PayloadError: safetensors cannot hold a tensor.
        OSError: the disk refuses.
    """
    about = {"format": "dense", "model": model, "method": method, "version": __version__}
    write_state(Path(path), state, about, owner_only=owner_only)


def save_factors(model: nn.Module, path: Path | str, *, private: bool = True) -> None:
    """Write a converted model's state and the description that `fedpara export` needs.

    Args:
        model: a converted model; a model without factors is written as well.
        path: of the file; its folder is created.
        private: whether to write private tensors, which otherwise never leave a device; without
            pFedPara's private factors the file is the shared model W1. A file with private tensors
            can be read by its owner alone (mode 0600).

    Raises:
        PayloadError: safetensors cannot hold a tensor.
        OSError: the disk refuses.
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
    write_state(Path(path), state, about, owner_only=bool(spec.private_keys & state.keys()))


def load_factors(model: nn.Module, path: Path | str) -> None:
    """Load a factor checkpoint strictly into a model that was converted in the same way.

    Private tensors that the file lacks keep their values.

    Raises:
        MismatchError: the file is of another model, or of one converted with other options.
        PayloadError: the file is damaged, or no factor checkpoint.
    """
    found = read_checkpoint(path)
    if found.spec is not None:
        adopt_plans(model, found.spec)
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
    """Raise for the first name that only one side has, or whose shapes differ.

    Args:
        state: tensors or shapes of the file.
        wanted: the model's state.
        optional: names that the file may lack, either all of them or none.
        there: what ``wanted`` is, in words.

    Raises:
        MismatchError: the message names the tensor and both shapes.
    """
    if hint := wrapper_hint(state, wanted):
        raise MismatchError(f"the file's names are not those of {there}:{hint}")
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
