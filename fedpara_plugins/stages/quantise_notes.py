"""The notes that stage ``quantise`` writes besides the symbols, and their reader."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.checks import unused_name
from fedpara_plugins.stages.dtypes import (
    REAL_DTYPES,
    SYMBOL_DTYPES,
    arithmetic_dtype,
    dtype_name,
    pack_dtypes,
    unpack_dtypes,
)
from fedpara_plugins.stages.quantise_steps import PER_BLOCK, PER_ROW, PER_TENSOR
from fedpara_plugins.stages.quantise_symbols import Symbols, escape_mask, far_dtype
from fedpara_plugins.stages.stage import Notes, Tensors, check_notes

__all__ = ["MAX_BLOCK", "QuantisedTensor", "dequantise", "read_quantised", "write_quantised"]

MAX_BLOCK = 2**20


class QuantisedTensor(NamedTuple):
    """How one tensor was quantised: its dtype, the letter of its scope, its steps and symbols."""

    dtype: torch.dtype
    scope: str
    steps: Sequence[float] | torch.Tensor
    symbols: Symbols


def write_quantised(
    coded: Tensors, quantised: Sequence[QuantisedTensor | None], block: int
) -> tuple[Tensors, Notes]:
    """Return the tensors to send and the notes.

    Args:
        coded: for each tensor its symbols, or the tensor itself if it was not quantised.
        quantised: one for each of them, None for a tensor that was not quantised.
        block: number of values of a block.

    Returns:
        ``coded``, followed by the steps of rows and blocks and by the escaped values if there are
        any; and the notes.
    """
    used = [one for one in quantised if one is not None]
    many = [one for one in used if one.scope != PER_TENSOR]
    steps = b"".join(_pack_step(one) for one in used if one.scope == PER_TENSOR)
    far = [one.symbols.far for one in used if len(one.symbols.far)]
    notes = {
        **pack_dtypes([None if one is None else one.dtype for one in quantised]),
        "scopes": "".join(one.scope for one in used),
        "block": block if any(one.scope == PER_BLOCK for one in many) else 0,
        "steps": base64.b64encode(steps).decode("ascii"),
        "far": sum(map(len, far)),
    }
    written = dict(coded)
    if many:
        double = any(one.dtype == torch.float64 for one in many)
        kind = torch.float64 if double else torch.float32
        every = [torch.as_tensor(one.steps, dtype=kind) for one in many]
        written[unused_name("steps", written)] = torch.cat(every)
    if far:
        values = torch.cat(far)
        largest = max(abs(int(end)) for end in torch.aminmax(values))
        written[unused_name("far", written)] = values.to(far_dtype(largest))
    return written, notes


def read_quantised(
    tensors: Tensors, notes: Notes
) -> tuple[dict[str, QuantisedTensor | torch.Tensor], int]:
    """Undo `write_quantised`.

    Returns:
        By name, how each tensor was quantised, or the tensor itself if it was not; and the number
        of values of a block.

    Raises:
        PayloadError: the notes are malformed, or do not fit the tensors.
    """
    fields = {"dtypes": list, "each": str, "scopes": str, "block": int, "steps": str, "far": int}
    check_notes("quantise", notes, fields)
    scopes, block = notes["scopes"], notes["block"]
    letters = {PER_TENSOR, PER_ROW, PER_BLOCK}
    if not set(scopes) <= letters or (PER_BLOCK in scopes) != (0 < block <= MAX_BLOCK):
        raise _malformed(f"scopes {scopes[:20]!r} with blocks of {block}")
    coded = dict(tensors)
    far = _pop_last(coded, notes["far"] != 0, (torch.int16, torch.int32))
    many = _pop_last(coded, bool(set(scopes) - {PER_TENSOR}), (torch.float32, torch.float64))
    dtypes = unpack_dtypes(notes, len(coded))
    used = [(x, dtype) for x, dtype in zip(coded.values(), dtypes, strict=True) if dtype]
    if len(used) != len(scopes) or notes["far"] != len(far):
        raise _malformed(f"{len(scopes)} scopes for {len(used)} tensors, or escaped values")
    for tensor, dtype in used:
        if tensor.dtype not in SYMBOL_DTYPES or tensor.ndim == 0 or dtype not in REAL_DTYPES:
            raise _malformed(f"{tuple(tensor.shape)} {tensor.dtype} for {dtype_name(dtype)}")
    kinds = [(dtype, letter) for (_, dtype), letter in zip(used, scopes, strict=True)]
    counts = [_group_count(x, letter, block) for (x, _), letter in zip(used, scopes, strict=True)]
    steps = _read_steps(notes["steps"], many, kinds, counts)
    symbols = _read_symbols([tensor for tensor, _ in used], far)
    found = map(QuantisedTensor, *zip(*kinds, strict=True), steps, symbols) if kinds else iter(())
    quantised = {
        name: x if dtype is None else next(found)
        for (name, x), dtype in zip(coded.items(), dtypes, strict=True)
    }
    return quantised, block


def dequantise(quantised: QuantisedTensor, block: int) -> torch.Tensor:
    """Return the products of symbols and steps, as float32 (float64 for float64 tensors)."""
    wide = arithmetic_dtype(quantised.dtype)
    near, far = quantised.symbols
    exact = near.contiguous().to(wide, copy=True)
    if len(far):
        exact.view(-1).numpy()[escape_mask(near)] = far.numpy()
    if quantised.scope == PER_TENSOR:
        return exact.mul_(float(quantised.steps[0]))
    steps = torch.as_tensor(quantised.steps, dtype=wide)
    if quantised.scope == PER_ROW:
        return exact.mul_(steps.reshape(-1, *[1] * (exact.ndim - 1)))
    flat = exact.view(-1)
    whole = len(flat) // block
    flat[: whole * block].view(whole, block).mul_(steps[:whole].unsqueeze(1))
    flat[whole * block :].mul_(steps[-1] if len(steps) > whole else 1)
    return exact


def _pop_last(coded: Tensors, present: bool, kinds: Sequence[torch.dtype]) -> torch.Tensor:
    """Remove and return the last tensor if there must be such a one; else return an empty one."""
    if not present:
        return torch.empty(0)
    if not coded:
        raise _malformed("a tensor is missing")
    last = coded.pop(next(reversed(coded)))
    if last.dtype not in kinds or last.ndim != 1:
        raise _malformed(f"{tuple(last.shape)} {last.dtype} for steps or escaped values")
    return last


def _pack_step(one: QuantisedTensor) -> bytes:
    return struct.pack("<d" if one.dtype == torch.float64 else "<f", float(one.steps[0]))


def _group_count(symbols: torch.Tensor, scope: str, block: int) -> int:
    if scope == PER_BLOCK:
        return -(-symbols.numel() // block)
    return symbols.shape[0] if scope == PER_ROW else 1


def _read_symbols(near: Sequence[torch.Tensor], far: torch.Tensor) -> list[Symbols]:
    counts = [int(np.count_nonzero(escape_mask(tensor))) for tensor in near]
    if sum(counts) != len(far):
        raise _malformed(f"{len(far)} values for {sum(counts)} symbols that escape")
    return [Symbols(*pair) for pair in zip(near, torch.split(far, counts), strict=True)]


def _read_steps(
    packed: str,
    many: torch.Tensor,
    kinds: Sequence[tuple[torch.dtype, str]],
    counts: Sequence[int],
) -> list[torch.Tensor]:
    """Return the steps of each quantised tensor.

    Args:
        packed: the note with the step of each tensor that has one only.
        many: the tensor of all other steps.
        kinds: dtype and scope of each quantised tensor.
        counts: number of its groups.
    """
    single = [dtype for dtype, letter in kinds if letter == PER_TENSOR]
    form = "<" + "".join("d" if dtype == torch.float64 else "f" for dtype in single)
    try:
        raw = base64.b64decode(packed, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _malformed(f"steps that are not base64: {error}") from error
    total = sum(n for n, (_, letter) in zip(counts, kinds, strict=True) if letter != PER_TENSOR)
    if len(raw) != struct.calcsize(form) or len(many) != total:
        raise _malformed(f"another number of steps than {len(single)} and {total}")
    ones, start = iter(struct.unpack(form, raw)), 0
    found: list[torch.Tensor] = []
    for (dtype, letter), count in zip(kinds, counts, strict=True):
        if letter == PER_TENSOR:
            steps = torch.tensor([next(ones)], dtype=torch.float64)
        else:
            steps = many[start : start + count]
            start += count
        found.append(_checked(steps, arithmetic_dtype(dtype)))
    return found


def _checked(steps: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """Return the same steps in the type in which the products are computed."""
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
