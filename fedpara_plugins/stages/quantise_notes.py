"""What stage ``quantise`` writes besides the symbols, and how a decoder reads it."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import free_name
from fedpara_plugins.stages.quantise_steps import arithmetic
from fedpara_plugins.stages.quantise_symbols import SYMBOL_DTYPES, Symbols, escaped, far_dtype
from fedpara_plugins.stages.stage import (
    REAL_DTYPES,
    Notes,
    Tensors,
    check_notes,
    dtype_name,
    pack_dtypes,
    unpack_dtypes,
)

__all__ = ["MAX_BLOCK", "ONE", "Part", "read_parts", "scaled", "written_parts"]

ONE = "t"
"""Letter of a tensor with one step; ``r`` has one for each row, ``b`` one for each block."""
MAX_BLOCK = 2**20


class Part(NamedTuple):
    """How one tensor was quantised: its dtype, the letter of its scope, its steps and symbols."""

    dtype: torch.dtype
    scope: str
    steps: Sequence[float] | torch.Tensor
    symbols: Symbols


def written_parts(
    coded: Tensors, parts: Sequence[Part | None], block: int
) -> tuple[Tensors, Notes]:
    """Symbols, behind them the steps of rows and blocks and the escaped values, and the notes."""
    used = [part for part in parts if part is not None]
    many = [part for part in used if part.scope != ONE]
    steps = b"".join(_packed_step(part) for part in used if part.scope == ONE)
    far = [part.symbols.far for part in used if len(part.symbols.far)]
    notes = {
        **pack_dtypes([None if part is None else part.dtype for part in parts]),
        "scopes": "".join(part.scope for part in used),
        "block": block if any(part.scope == "b" for part in many) else 0,
        "steps": base64.b64encode(steps).decode("ascii"),
        "far": sum(map(len, far)),
    }
    written = dict(coded)
    if many:
        double = any(part.dtype == torch.float64 for part in many)
        kind = torch.float64 if double else torch.float32
        every = [torch.as_tensor(part.steps, dtype=kind) for part in many]
        written[free_name("steps", written)] = torch.cat(every)
    if far:
        values = torch.cat(far)
        largest = max(abs(int(end)) for end in torch.aminmax(values))
        written[free_name("far", written)] = values.to(far_dtype(largest))
    return written, notes


def read_parts(tensors: Tensors, notes: Notes) -> tuple[dict[str, Part | torch.Tensor], int]:
    """Undo `written_parts`: what was quantised, what was not, and the size of a block.

    Raises:
        PayloadError: the notes are malformed, or do not fit the tensors.
    """
    fields = {"dtypes": list, "each": str, "scopes": str, "block": int, "steps": str, "far": int}
    check_notes("quantise", notes, fields)
    scopes, block = notes["scopes"], notes["block"]
    if not set(scopes) <= set("trb") or ("b" in scopes) != (0 < block <= MAX_BLOCK):
        raise _malformed(f"scopes {scopes[:20]!r} with blocks of {block}")
    coded = dict(tensors)
    far = _taken(coded, notes["far"] != 0, (torch.int16, torch.int32))
    many = _taken(coded, bool(set(scopes) - {ONE}), (torch.float32, torch.float64))
    dtypes = unpack_dtypes(notes, len(coded))
    used = [(x, dtype) for x, dtype in zip(coded.values(), dtypes, strict=True) if dtype]
    if len(used) != len(scopes) or notes["far"] != len(far):
        raise _malformed(f"{len(scopes)} scopes for {len(used)} tensors, or escaped values")
    for tensor, dtype in used:
        if tensor.dtype not in SYMBOL_DTYPES or tensor.ndim == 0 or dtype not in REAL_DTYPES:
            raise _malformed(f"{tuple(tensor.shape)} {tensor.dtype} for {dtype_name(dtype)}")
    kinds = [(dtype, letter) for (_, dtype), letter in zip(used, scopes, strict=True)]
    counts = [_count(x, letter, block) for (x, _), letter in zip(used, scopes, strict=True)]
    steps = _read_steps(notes["steps"], many, kinds, counts)
    symbols = _read_symbols([tensor for tensor, _ in used], far)
    found = map(Part, *zip(*kinds, strict=True), steps, symbols) if kinds else iter(())
    parts = {
        name: x if dtype is None else next(found)
        for (name, x), dtype in zip(coded.items(), dtypes, strict=True)
    }
    return parts, block


def scaled(part: Part, block: int) -> torch.Tensor:
    """The products of symbols and steps, in the part's arithmetic."""
    wide = arithmetic(part.dtype)
    exact = part.symbols.near.contiguous().to(wide, copy=True)
    if len(part.symbols.far):
        exact.view(-1).numpy()[escaped(part.symbols.near)] = part.symbols.far.numpy()
    if part.scope == ONE:
        return exact.mul_(float(part.steps[0]))
    steps = torch.as_tensor(part.steps, dtype=wide)
    if part.scope == "r":
        return exact.mul_(steps.reshape(-1, *[1] * (exact.ndim - 1)))
    flat = exact.view(-1)
    whole = len(flat) // block
    flat[: whole * block].view(whole, block).mul_(steps[:whole].unsqueeze(1))
    flat[whole * block :].mul_(steps[-1] if len(steps) > whole else 1)
    return exact


def _taken(coded: Tensors, there: bool, kinds: Sequence[torch.dtype]) -> torch.Tensor:
    """The last tensor, taken out, if it is there; else an empty one."""
    if not there:
        return torch.empty(0)
    if not coded:
        raise _malformed("a tensor is missing")
    last = coded.pop(next(reversed(coded)))
    if last.dtype not in kinds or last.ndim != 1:
        raise _malformed(f"{tuple(last.shape)} {last.dtype} for steps or escaped values")
    return last


def _packed_step(part: Part) -> bytes:
    return struct.pack("<d" if part.dtype == torch.float64 else "<f", float(part.steps[0]))


def _count(symbols: torch.Tensor, scope: str, block: int) -> int:
    if scope == "b":
        return -(-symbols.numel() // block)
    return symbols.shape[0] if scope == "r" else 1


def _read_symbols(near: Sequence[torch.Tensor], far: torch.Tensor) -> list[Symbols]:
    counts = [int(np.count_nonzero(escaped(tensor))) for tensor in near]
    if sum(counts) != len(far):
        raise _malformed(f"{len(far)} values for {sum(counts)} symbols that escape")
    return [Symbols(*pair) for pair in zip(near, torch.split(far, counts), strict=True)]


def _read_steps(
    packed: str,
    many: torch.Tensor,
    kinds: Sequence[tuple[torch.dtype, str]],
    counts: Sequence[int],
) -> list[torch.Tensor]:
    single = [dtype for dtype, letter in kinds if letter == ONE]
    form = "<" + "".join("d" if dtype == torch.float64 else "f" for dtype in single)
    try:
        raw = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _malformed(f"steps that are not base64: {error}") from error
    total = sum(n for n, (_, letter) in zip(counts, kinds, strict=True) if letter != ONE)
    if len(raw) != struct.calcsize(form) or len(many) != total:
        raise _malformed(f"another number of steps than {len(single)} and {total}")
    ones, start = iter(struct.unpack(form, raw)), 0
    found: list[torch.Tensor] = []
    for (dtype, letter), count in zip(kinds, counts, strict=True):
        if letter == ONE:
            steps = torch.tensor([next(ones)], dtype=torch.float64)
        else:
            steps = many[start : start + count]
            start += count
        found.append(_checked(steps, arithmetic(dtype)))
    return found


def _checked(steps: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The same steps in the type that the products are taken in."""
    exact = steps.to(wide)
    kind = torch.finfo(wide)
    if not steps.numel():
        return exact
    low, high = map(float, torch.aminmax(exact))
    if not kind.tiny <= low <= high <= kind.max or not torch.equal(exact.to(steps.dtype), steps):
        raise _malformed(f"a step that is no normal number of {wide}")
    return exact


def _malformed(what: str) -> PayloadError:
    return PayloadError(f"stage 'quantise': the notes do not fit the tensors: {what}")
