"""Stage ``sz3``: every value within a stated distance, by the compressor SZ3.

What a third party writes to add a codec stage: a subclass of `Stage`, a hook that registers it, and
in ``pyproject.toml`` the entry point that names this module. Users then write it into their codec::

    codec = "delta+sz3:error=1e-3"

The library is imported at the first use, so that an installation without it still starts.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping

import torch

from fedpara_plugins import ConfigError, PayloadError, hookimpl
from fedpara_plugins.codecs import (
    Notes,
    Stage,
    Tensors,
    byte_size,
    check_limit,
    check_notes,
    pack_dtypes,
    unpack_dtypes,
)

__all__ = ["Sz3Stage", "fedpara_register_stages"]

DTYPES = (torch.float32, torch.float64)
# An SZ3 stream: 4 bytes of magic number, 4 of version, 8 that say how long the next part is. That
# part begins with 8 bytes saying how long it is without its own compression (by zstd).
_HEAD = struct.Struct("<8xQQ")


class Sz3Stage(Stage):
    """|decoded - sent| <= error for each value of float32 and float64 tensors; others pass.

    Each tensor travels as one SZ3 stream, a uint8 tensor of one dimension under its own name.

    Notes: ``dtypes`` and ``each`` (see `pack_dtypes`; ``-`` for a tensor passed unchanged), and
    ``shapes`` of the others. Streams say themselves with which error they were made.

    Args:
        error: largest distance, in the units of the values (for ``delta+sz3``: of the update).

    Source: SZ3, https://github.com/szcompressor/SZ3, through its Python package ``pysz``.
    """

    name = "sz3"
    lossless = False
    shortens = True

    def __init__(self, error: float = 1e-3) -> None:
        self.error = error

    @property
    def options(self) -> Mapping[str, str]:
        """The error, as in the codec's text."""
        return {"error": repr(self.error)}

    def with_options(self, options: Mapping[str, str]) -> Stage:
        """A stage with ``error``.

        Raises:
            ConfigError: another option, or no positive number.
        """
        unknown = set(options) - {"error"}
        if unknown:
            raise ConfigError(f"'sz3' has no option {min(unknown)!r}; known: error")
        text = options.get("error", "1e-3")
        try:
            error = float(text)
        except ValueError:
            error = math.nan
        if not 0 < error < math.inf:
            raise ConfigError(f"option 'error' of 'sz3': expected a positive number, got {text!r}")
        return Sz3Stage(error)

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Compress.

        Raises:
            PayloadError: a tensor holds NaN or infinity, for which there is no distance.
        """
        coded: Tensors = {}
        kinds: list[torch.dtype | None] = []
        for name, tensor in tensors.items():
            acts = tensor.dtype in DTYPES and tensor.numel() > 0
            coded[name] = self._compressed(name, tensor) if acts else tensor
            kinds.append(tensor.dtype if acts else None)
        shapes = [list(x.shape) for x, kind in zip(tensors.values(), kinds, strict=True) if kind]
        return coded, {**pack_dtypes(kinds), "shapes": shapes}

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Decompress.

        Raises:
            PayloadError: the notes do not fit the tensors, a stream is damaged or of another
                size, or the values exceed the limit.
        """
        check_notes(self.name, notes, {"dtypes": list, "each": str, "shapes": list})
        kinds = unpack_dtypes(notes, len(tensors))
        shapes = notes["shapes"]
        if len(shapes) != sum(kind is not None for kind in kinds) or not all(map(_sound, shapes)):
            raise PayloadError("stage 'sz3': the shapes are no lists of sizes, or of another count")
        if not {kind for kind in kinds if kind is not None} <= set(DTYPES):
            raise PayloadError("stage 'sz3': only F32 and F64 are compressed")
        rest = iter(shapes)
        plan = [
            (name, tensor, kind, next(rest) if kind is not None else list(tensor.shape))
            for (name, tensor), kind in zip(tensors.items(), kinds, strict=True)
        ]
        size = sum(byte_size(kind or tensor.dtype, shape) for _, tensor, kind, shape in plan)
        check_limit(size, limit, "the values behind the sz3 streams")
        return {
            name: tensor if kind is None else _values(name, tensor, kind, shape)
            for name, tensor, kind, shape in plan
        }

    def _compressed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        from pysz import sz, szConfig, szErrorBoundMode

        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise PayloadError(
                f"tensor {name!r}: {bad} of {tensor.numel()} values are NaN or infinite, which sz3 "
                "cannot bound; lower the learning rate or clip gradients"
            )
        config = szConfig()
        config.errorBoundMode = szErrorBoundMode.ABS
        config.absErrorBound = self.error
        stream, _ = sz.compress(tensor.detach().contiguous().reshape(-1).numpy(), config)
        return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def _sound(shape: object) -> bool:
    """Whether a shape from the network is a list of sizes, none of them zero."""
    return isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape)


def _values(name: str, tensor: torch.Tensor, kind: torch.dtype, shape: list[int]) -> torch.Tensor:
    from pysz import sz

    stream = tensor.numpy()
    size = byte_size(kind, shape)
    whole = tensor.dtype == torch.uint8 and tensor.ndim == 1 and len(stream) >= _HEAD.size
    inner = _HEAD.unpack_from(stream)[1] if whole else None
    # The library refuses damage, but allocates what the stream declares: at most what values take
    # that no step suits, with the tables that go with them.
    if inner is None or inner > 2 * size + 2**16:
        raise PayloadError(
            f"tensor {name!r}: expected an sz3 stream for {size} bytes, got "
            f"{tuple(tensor.shape)} {tensor.dtype} that declares {inner} bytes"
        )
    dtype = str(kind).removeprefix("torch.")
    try:
        values, _ = sz.decompress(stream, dtype, (math.prod(shape),))
    except Exception as error:  # the library raises whatever C++ threw
        raise PayloadError(f"tensor {name!r}: damaged sz3 stream: {error!r}") from error
    return torch.from_numpy(values).reshape(shape)


@hookimpl
def fedpara_register_stages(register: Callable[[Stage], None]) -> None:
    """Register the stage."""
    register(Sz3Stage())
