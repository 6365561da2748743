"""Stage ``quantise``: whole multiples of one uniform step for each tensor, row or block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.stages.checks import all_finite
from fedpara_plugins.stages.dtypes import REAL_DTYPES, arithmetic_dtype, dtype_name
from fedpara_plugins.stages.handed_over import (
    HandedOver,
    check_decoded,
    decode_each,
    may_overwrite,
)
from fedpara_plugins.stages.options import (
    check_option_names,
    number_text,
    read_choice,
    read_integer,
    read_number,
)
from fedpara_plugins.stages.quantise_notes import (
    MAX_BLOCK,
    QuantisedTensor,
    ReadNotes,
    SymbolGroups,
    dequantise,
    dequantise_together,
    read_quantised,
    write_quantised,
)
from fedpara_plugins.stages.quantise_steps import PER_TENSOR, QuantiserStep, Rows, StepRule, group
from fedpara_plugins.stages.quantise_symbols import narrowest_symbols
from fedpara_plugins.stages.small_tensors import SMALL, batches, parts_of
from fedpara_plugins.stages.stage import Notes, Stage, Tensors

__all__ = ["QuantiseStage", "fresh_generator"]

SCOPES = ("tensor", "row", "block")
ROUNDINGS = ("nearest", "stochastic")
FLAT_BITS = 8
"""Bits for tensors of one dimension: biases and norms are few, and matter."""


def fresh_generator() -> torch.Generator:
    """Return a generator seeded by the operating system, so that torch's own stays untouched."""
    generator = torch.Generator()
    generator.seed()
    return generator


@dataclass(frozen=True)
class QuantiseStage(Stage):
    """Symbols q = x / s rounded to an integer, from which x = q * s.

    Nothing is clipped, so |error| <= s / 2. Acts on float16, bfloat16, float32 and float64 tensors
    of at least one dimension; arithmetic is float32 (float64 for float64 tensors), and the product
    is rounded once more to the tensor's dtype. A tensor whose symbols would be wider than its
    values, or that holds infinities, is sent as it is. Tensors of one dimension always have 8-bit
    steps.

    Args:
        bits: s = max|x| / (2^(bits - 1) - 1), so that symbols have that many bits; 2 to 16.
        rms: s = rms * (root mean square of x) instead, but at most max|x|, so that the largest
            value is never rounded to zero and error feedback makes progress; 0.001 to 16.
        scope: what has a step of its own: a ``tensor``, a ``row`` (all values that share the first
            index), or a ``block`` of successive values. Tensors of one dimension have one step, and
            so have those that more steps would make larger than they were.
        block: values of a block, in row-major order; the last one of a tensor may have fewer.
        rounding: ``nearest``, or ``stochastic``: up or down at random so that the mean is exact;
            then |error| < s.
        generator: returns the random generator for one call of `encode`.
    """

    name = "quantise"
    lossless = False
    shortens = True
    owns_output = True

    bits: int | None = 8
    rms: float | None = None
    scope: str = "tensor"
    block: int = 256
    rounding: str = "nearest"
    generator: Callable[[], torch.Generator] = field(default=fresh_generator, repr=False)

    @property
    def options(self) -> Mapping[str, str]:
        """Options as in the codec's text, without defaults but with the step."""
        step = {"bits": str(self.bits)} if self.rms is None else {"rms": number_text(self.rms)}
        size = {"block": str(self.block)} if self.scope == "block" else {}
        rest = {"scope": self.scope, **size, "rounding": self.rounding}
        return {**step, **{key: value for key, value in rest.items() if value != _DEFAULTS[key]}}

    def with_options(self, options: Mapping[str, str]) -> QuantiseStage:
        """Return a stage with the options ``bits`` or ``rms``, ``scope``, ``block``, ``rounding``.

        Raises:
            ConfigError: unknown option, value out of range, or two options that exclude each other.
        """
        check_option_names(self.name, options, ("bits", "rms", "scope", "block", "rounding"))
        if "bits" in options and "rms" in options:
            raise ConfigError("options 'bits' and 'rms' of 'quantise' exclude each other")
        scope = read_choice(self.name, "scope", options.get("scope", "tensor"), SCOPES)
        if "block" in options and scope != "block":
            raise ConfigError("option 'block' of 'quantise' needs scope=block")
        rms = read_number(self.name, "rms", options["rms"], 0.001, 16) if "rms" in options else None
        bits = read_integer(self.name, "bits", options.get("bits", "8"), 2, 16)
        rounding = options.get("rounding", "nearest")
        return QuantiseStage(
            bits=bits if rms is None else None,
            rms=rms,
            scope=scope,
            block=read_integer(self.name, "block", options.get("block", "256"), 16, MAX_BLOCK),
            rounding=read_choice(self.name, "rounding", rounding, ROUNDINGS),
            generator=self.generator,
        )

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Quantise.

        Raises:
            PayloadError: a tensor to be quantised holds NaN.
        """
        generator = self.generator() if self.rounding == "stochastic" else None
        double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
        buffers = _ScratchBuffers()
        coded: Tensors = {}
        quantised: list[QuantisedTensor | None] = []
        for name, tensor in tensors.items():
            acts = tensor.dtype in REAL_DTYPES and tensor.ndim > 0
            one = None
            if acts:
                one = self._quantise(name, tensor, generator, buffers, 8 if double else 4)
            coded[name] = tensor if one is None else one.symbols.near
            quantised.append(one)
        return write_quantised(coded, quantised, self.block)

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Multiply by the steps.

        Raises:
            PayloadError: the notes do not fit the tensors, or the values exceed the limit.
        """
        tensors = tensors if isinstance(tensors, HandedOver) else dict(tensors)
        found = read_quantised(tensors, notes)
        groups = iter(found.groups)
        done: Tensors = {}

        def in_place(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
            return tensor.itemsize == dtype.itemsize and may_overwrite(tensors, tensor)

        def decode(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
            group = next(groups)
            if name in done:
                return done.pop(name)
            own = in_place(tensor, dtype)
            out = (
                tensor.view(dtype) if own else torch.empty(tensor.shape, dtype=dtype, device="cpu")
            )
            dequantise(tensor, group, out=out)
            _check_finite(name, out)
            return out

        check_decoded(
            tensors,
            found.dtypes,
            limit,
            "the values behind the symbols",
            in_place=in_place,
            held=found.held,
        )
        size = sum(tensor.nbytes for tensor in tensors.values())
        if not isinstance(tensors, HandedOver) or tensors.fits(8 * size + found.held):
            done = _small_tensors(tensors, found)
        return decode_each(tensors, found.dtypes, decode)

    def _quantise(
        self,
        name: str,
        tensor: torch.Tensor,
        generator: torch.Generator | None,
        buffers: _ScratchBuffers,
        step_bytes: int,
    ) -> QuantisedTensor | None:
        """Return symbols and steps; None if they would take more bytes, or there are infinities."""
        flat = tensor.ndim == 1
        rule = StepRule(FLAT_BITS if flat else self.bits, None if flat else self.rms)
        exact = tensor.detach().to(arithmetic_dtype(tensor.dtype)).numpy()
        wanted = PER_TENSOR if flat or tensor.numel() == 0 else self.scope[0]
        for scope in dict.fromkeys((wanted, PER_TENSOR)):
            rows = group(exact, scope, self.block)
            steps = rule.steps(name, rows, tensor)
            if steps is None:
                return None
            counts = _round_to_steps(rows, steps, generator, buffers.like(rows))
            counts = counts.reshape(-1)[: exact.size].reshape(exact.shape)
            symbols = narrowest_symbols(counts, max(step.largest_symbol for step in steps))
            if symbols is None:
                continue
            size = symbols.near.nbytes + symbols.far.nbytes
            if size + (0 if scope == PER_TENSOR else step_bytes * len(steps)) <= tensor.nbytes:
                return QuantisedTensor(tensor.dtype, scope, [step.size for step in steps], symbols)
        return None


_DEFAULTS = {"scope": "tensor", "block": "256", "rounding": "nearest"}


class _ScratchBuffers:
    """Memory that successive tensors reuse: touching fresh pages costs more than the division."""

    def __init__(self) -> None:
        self._held: dict[np.dtype[Any], Rows] = {}

    def like(self, rows: Rows) -> Rows:
        """Return a contiguous array of the shape and dtype of ``rows``, with any content."""
        held = self._held.get(rows.dtype)
        if held is None or held.size < rows.size:
            held = self._held[rows.dtype] = np.empty(rows.size, dtype=rows.dtype)
        return held[: rows.size].reshape(rows.shape)


def _round_to_steps(
    rows: Rows, steps: Sequence[QuantiserStep], generator: torch.Generator | None, out: Rows
) -> Rows:
    """Return whole numbers of steps, still as floating point; written into ``out``."""
    sizes = np.array([[step.size] for step in steps], dtype=rows.dtype)
    np.divide(rows, sizes, out=out)
    if generator is None:
        return np.rint(out, out=out)
    noise = torch.from_numpy(out)
    noise += torch.rand(out.shape, generator=generator, dtype=noise.dtype)
    np.floor(out, out=out)
    # The sum was rounded, and may have reached the next whole number.
    most = np.array([[step.largest_symbol] for step in steps], dtype=rows.dtype)
    return np.clip(out, -most, most, out=out)


def _small_tensors(tensors: Tensors, found: ReadNotes) -> Tensors:
    """Return the small tensors behind their symbols, many at a time.

    Raises:
        PayloadError: see `_check_finite`.
    """
    groups: dict[str, SymbolGroups] = {}
    kinds: dict[str, tuple[torch.dtype, torch.dtype, bool]] = {}
    every = iter(found.groups)
    for (name, tensor), dtype in zip(tensors.items(), found.dtypes, strict=True):
        if dtype is None:
            continue
        group = next(every)
        if 0 < tensor.nbytes <= SMALL:
            groups[name] = group
            kinds[name] = (tensor.dtype, dtype, isinstance(group.steps, torch.Tensor))
    decoded: Tensors = {}
    for (_, dtype, _), names in batches(tensors, kinds):
        symbols = [tensors[name] for name in names]
        values, counts = dequantise_together(symbols, [groups[name] for name in names], dtype)
        parts = list(parts_of(values, counts, [each.shape for each in symbols]))
        if not all_finite(values):
            for name, part in zip(names, parts, strict=True):
                _check_finite(name, part)
        decoded.update(zip(names, parts, strict=True))
    return decoded


def _check_finite(name: str, values: torch.Tensor) -> None:
    if not all_finite(values):
        raise PayloadError(
            f"tensor {name!r}: a symbol times its step exceeds {dtype_name(values.dtype)}; the "
            "payload is forged"
        )
