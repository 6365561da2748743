"""Stage ``cast``: float32 and float64 values as float16 or bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.dtypes import dtype_name, pack_dtypes, unpack_dtypes
from fedpara_plugins.stages.handed_over import check_decoded, decode_each
from fedpara_plugins.stages.options import check_option_names, read_choice
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_notes

__all__ = ["CastStage"]

KINDS: Mapping[str, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16}
_WIDE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class CastStage(Stage):
    """Values rounded to a narrower type; the receiver widens them.

    Acts on float32 and float64 tensors of at least one dimension. NaN and infinity stay as they
    are; a finite value that the narrower type cannot hold is refused.

    Args:
        to: ``bf16`` (any float32 value, 8 significant bits) or ``fp16`` (11 significant bits for
            values from 6e-5 to 65504, fewer below; updates are often smaller).

    Notes: ``dtypes`` and ``each`` (see `pack_dtypes`): the dtypes before the cast.
    """

    name = "cast"
    lossless = False
    shortens = True
    owns_output = True

    to: str = "bf16"

    @property
    def options(self) -> Mapping[str, str]:
        """Options as in the codec's text."""
        return {"to": self.to}

    def with_options(self, options: Mapping[str, str]) -> CastStage:
        """Return a stage with the option ``to``.

        Raises:
            ConfigError: unknown option, or another type.
        """
        check_option_names(self.name, options, ("to",))
        return CastStage(read_choice(self.name, "to", options.get("to", "bf16"), tuple(KINDS)))

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Round to the narrower type.

        Raises:
            PayloadError: a finite value overflows the narrower type.
        """
        acts = {name: x.dtype in _WIDE and x.ndim > 0 for name, x in tensors.items()}
        coded = {name: self._cast(name, x) if acts[name] else x for name, x in tensors.items()}
        return coded, pack_dtypes([x.dtype if acts[name] else None for name, x in tensors.items()])

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Widen to the dtypes before the cast.

        Raises:
            PayloadError: the notes do not fit the tensors, or the values exceed the limit.
        """
        check_notes(self.name, notes, {"dtypes": list, "each": str})
        dtypes = unpack_dtypes(notes, len(tensors))
        check_decoded(tensors, dtypes, limit, "the values behind the cast")
        for (name, tensor), dtype in zip(tensors.items(), dtypes, strict=True):
            narrow = tensor.dtype in KINDS.values() and tensor.ndim > 0
            if dtype is not None and not (narrow and dtype in _WIDE):
                raise PayloadError(
                    f"tensor {name!r}: expected F16 or BF16 for F32 or F64, got "
                    f"{tuple(tensor.shape)} {tensor.dtype} for {dtype_name(dtype)}"
                )
        return decode_each(tensors, dtypes, lambda name, x, dtype: x.to(dtype))

    def _cast(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        narrow = tensor.detach().to(KINDS[self.to])
        lost = torch.isinf(narrow) & torch.isfinite(tensor)
        if bool(lost.any()):
            remedy = "use cast:to=bf16" if self.to == "fp16" else "use quantise, or 'lossless'"
            raise PayloadError(
                f"tensor {name!r}: {int(lost.sum())} of {tensor.numel()} values, up to "
                f"{float(tensor[lost].abs().max()):.3g}, exceed {self.to}'s largest number "
                f"{torch.finfo(narrow.dtype).max:.6g}; {remedy}"
            )
        return narrow
