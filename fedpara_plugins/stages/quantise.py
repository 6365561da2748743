"""Stage ``quantise``: whole multiples of one uniform step for each tensor, row or block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.stages.options import choice, known_options, number_text, real, whole
from fedpara_plugins.stages.quantise_notes import (
    MAX_BLOCK,
    ONE,
    Part,
    read_parts,
    scaled,
    written_parts,
)
from fedpara_plugins.stages.quantise_steps import Rows, Step, StepRule, arithmetic, grouped
from fedpara_plugins.stages.quantise_symbols import narrowed
from fedpara_plugins.stages.stage import (
    REAL_DTYPES,
    Notes,
    Stage,
    Tensors,
    byte_size,
    check_limit,
    dtype_name,
)

__all__ = ["QuantiseStage", "fresh_generator"]

SCOPES = ("tensor", "row", "block")
ROUNDINGS = ("nearest", "stochastic")
FLAT_BITS = 8
"""Of tensors of one dimension: biases and norms are few, and matter."""
_SYMBOLS = ((127, torch.int8), (2**15 - 1, torch.int16), (2**31 - 1, torch.int32))


def fresh_generator() -> torch.Generator:
    """Seeded by the operating system: torch's own generator stays as the user's code needs it."""
    generator = torch.Generator()
    generator.seed()
    return generator


@dataclass(frozen=True)
class QuantiseStage(Stage):
    """q = x / s rounded to an integer, x = q * s; nothing is clipped, so |error| <= s / 2.

    Acts on float16, bfloat16, float32 and float64 tensors of at least one dimension; arithmetic is
    float32 (float64 for float64 tensors), and the product is rounded once more to the tensor's
    dtype. A tensor whose symbols would be wider than its values travels as it is.

    Args:
        bits: s = max|x| / (2^(bits - 1) - 1), so that symbols have that many bits; 2 to 16.
        rms: s = rms * (root mean square of x) instead, but at most max|x|: the largest value
            always arrives, and feedback cannot starve; 0.001 to 16.
        scope: what has a step of its own: a ``tensor``, a ``row`` (all that shares the first
            index), or a ``block`` of successive values. Tensors of one dimension, and those that
            the steps would make larger than they were, have one step.
        block: values of a block, in row-major order; the last one of a tensor may have fewer.
        rounding: ``nearest``, or ``stochastic``: up or down by chance so that the mean is exact;
            then |error| < s.
        generator: makes the source of that chance, once for each `encode`.

    Tensors of one dimension always have 8-bit steps.
    """

    name = "quantise"
    lossless = False
    shortens = True

    bits: int | None = 8
    rms: float | None = None
    scope: str = "tensor"
    block: int = 256
    rounding: str = "nearest"
    generator: Callable[[], torch.Generator] = field(default=fresh_generator, repr=False)

    @property
    def options(self) -> Mapping[str, str]:
        """As in the codec's text; defaults are left out, the step is not."""
        step = {"bits": str(self.bits)} if self.rms is None else {"rms": number_text(self.rms)}
        size = {"block": str(self.block)} if self.scope == "block" else {}
        rest = {"scope": self.scope, **size, "rounding": self.rounding}
        return {**step, **{key: value for key, value in rest.items() if value != _DEFAULTS[key]}}

    def with_options(self, options: Mapping[str, str]) -> QuantiseStage:
        """Options ``bits`` or ``rms``, ``scope``, ``block``, ``rounding``.

        Raises:
            ConfigError: unknown option, value out of range, or two that exclude each other.
        """
        known_options(self.name, options, ("bits", "rms", "scope", "block", "rounding"))
        if "bits" in options and "rms" in options:
            raise ConfigError("options 'bits' and 'rms' of 'quantise' exclude each other")
        scope = choice(self.name, "scope", options.get("scope", "tensor"), SCOPES)
        if "block" in options and scope != "block":
            raise ConfigError("option 'block' of 'quantise' needs scope=block")
        rms = real(self.name, "rms", options["rms"], 0.001, 16) if "rms" in options else None
        return QuantiseStage(
            bits=whole(self.name, "bits", options.get("bits", "8"), 2, 16) if rms is None else None,
            rms=rms,
            scope=scope,
            block=whole(self.name, "block", options.get("block", "256"), 16, MAX_BLOCK),
            rounding=choice(self.name, "rounding", options.get("rounding", "nearest"), ROUNDINGS),
            generator=self.generator,
        )

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Quantise.

        Raises:
            PayloadError: a tensor to be quantised holds NaN or infinity.
        """
        chance = self.generator() if self.rounding == "stochastic" else None
        double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
        room = _Room()
        coded: Tensors = {}
        parts: list[Part | None] = []
        for name, tensor in tensors.items():
            acts = tensor.dtype in REAL_DTYPES and tensor.ndim > 0
            part = self._part(name, tensor, chance, room, 8 if double else 4) if acts else None
            coded[name] = tensor if part is None else part.symbols.near
            parts.append(part)
        return written_parts(coded, parts, self.block)

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Multiply by the steps.

        Raises:
            PayloadError: the notes do not fit the tensors, or the values exceed the limit.
        """
        parts, block = read_parts(tensors, notes)
        size = sum(
            byte_size(part.dtype, part.symbols.near.shape)
            if isinstance(part, Part)
            else byte_size(part.dtype, part.shape)
            for part in parts.values()
        )
        check_limit(size, limit, "the values behind the symbols")
        return {
            name: _values(name, part, block) if isinstance(part, Part) else part
            for name, part in parts.items()
        }

    def _part(
        self,
        name: str,
        tensor: torch.Tensor,
        chance: torch.Generator | None,
        room: _Room,
        step_size: int,
    ) -> Part | None:
        """Symbols and steps; None where they would take more bytes than the values."""
        flat = tensor.ndim == 1
        rule = StepRule(FLAT_BITS if flat else self.bits, None if flat else self.rms)
        exact = tensor.detach().to(arithmetic(tensor.dtype)).numpy()
        wanted = ONE if flat or tensor.numel() == 0 else self.scope[0]
        for scope in dict.fromkeys((wanted, ONE)):
            rows = grouped(exact, scope, self.block)
            steps = rule.steps(name, rows, tensor)
            counts = _counts(rows, steps, chance, room.like(rows)).reshape(-1)[: exact.size]
            symbols = narrowed(counts.reshape(exact.shape), max(step.most for step in steps))
            if symbols is None:
                continue
            size = symbols.near.nbytes + symbols.far.nbytes
            if size + (0 if scope == ONE else step_size * len(steps)) <= tensor.nbytes:
                return Part(tensor.dtype, scope, [step.size for step in steps], symbols)
        return None


_DEFAULTS = {"scope": "tensor", "block": "256", "rounding": "nearest"}


class _Room:
    """Memory for one tensor's counts, then the next one's: fresh pages cost more than dividing."""

    def __init__(self) -> None:
        self._held: dict[np.dtype[Any], Rows] = {}

    def like(self, rows: Rows) -> Rows:
        """Contiguous, of the shape and dtype of ``rows``; holds anything."""
        held = self._held.get(rows.dtype)
        if held is None or held.size < rows.size:
            held = self._held[rows.dtype] = np.empty(rows.size, dtype=rows.dtype)
        return held[: rows.size].reshape(rows.shape)


def _counts(
    rows: Rows, steps: Sequence[Step], chance: torch.Generator | None, counts: Rows
) -> Rows:
    """Whole numbers of steps, still as floating point; written into ``counts``."""
    sizes = np.array([[step.size] for step in steps], dtype=rows.dtype)
    np.divide(rows, sizes, out=counts)
    if chance is None:
        return np.rint(counts, out=counts)
    noise = torch.from_numpy(counts)
    noise += torch.rand(counts.shape, generator=chance, dtype=noise.dtype)
    np.floor(counts, out=counts)
    # The sum is rounded, and may reach the next whole number.
    most = np.array([[step.most] for step in steps], dtype=rows.dtype)
    return np.clip(counts, -most, most, out=counts)


def _values(name: str, part: Part, block: int) -> torch.Tensor:
    values = scaled(part, block).to(part.dtype)
    if values.numel() and not all(map(math.isfinite, torch.aminmax(values))):
        raise PayloadError(
            f"tensor {name!r}: a symbol times its step is no {dtype_name(part.dtype)}: forged"
        )
    return values
