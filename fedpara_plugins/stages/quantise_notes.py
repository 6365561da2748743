"""The notes that stage ``quantise`` writes besides the symbols, and their reader."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Sequence
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
from fedpara_plugins.stages.handed_over import CHUNK, in_chunks
from fedpara_plugins.stages.quantise_steps import PER_BLOCK, PER_ROW, PER_TENSOR
from fedpara_plugins.stages.quantise_symbols import Symbols, escape_mask, far_dtype
from fedpara_plugins.stages.small_tensors import SMALL, Counts, batches, joined
from fedpara_plugins.stages.stage import Notes, Tensors, check_notes

__all__ = [
    "MAX_BLOCK",
    "QuantisedTensor",
    "ReadNotes",
    "SymbolGroups",
    "dequantise",
    "dequantise_together",
    "read_quantised",
    "write_quantised",
]

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


class SymbolGroups(NamedTuple):
    """The groups of one tensor's symbols: values of a group, a step for each, escaped values."""

    size: int
    steps: Sequence[float] | torch.Tensor
    far: torch.Tensor


class ReadNotes(NamedTuple):
    """What the notes say.

    Attributes:
        dtypes: for each tensor its dtype; None if it was not quantised.
        groups: of each tensor that was quantised, in order.
        held: bytes of the steps and escaped values.
    """

    dtypes: list[torch.dtype | None]
    groups: list[SymbolGroups]
    held: int


def read_quantised(coded: Tensors, notes: Notes) -> ReadNotes:
    """Undo `write_quantised`, but for the products.

    Args:
        coded: the tensors; steps and escaped values are taken out of it.
        notes: as received.

    Raises:
        PayloadError: the notes are malformed, or do not fit the tensors.
    """
    fields = {"dtypes": list, "each": str, "scopes": str, "block": int, "steps": str, "far": int}
    check_notes("quantise", notes, fields)
    scopes, block = notes["scopes"], notes["block"]
    letters = {PER_TENSOR, PER_ROW, PER_BLOCK}
    if not set(scopes) <= letters or (PER_BLOCK in scopes) != (0 < block <= MAX_BLOCK):
        raise _malformed(f"scopes {scopes[:20]!r} with blocks of {block}")
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
    sizes = [_group_size(x, letter, block) for (x, _), letter in zip(used, scopes, strict=True)]
    steps = _read_steps(notes["steps"], many, kinds, counts)
    escaped = _split_escaped([tensor for tensor, _ in used], far)
    groups = list(map(SymbolGroups, sizes, steps, escaped))
    return ReadNotes(dtypes, groups, many.nbytes + far.nbytes)


def dequantise(symbols: torch.Tensor, groups: SymbolGroups, *, out: torch.Tensor) -> None:
    """Write the products of symbols and steps, computed in float32 (float64 for float64 tensors).

    Args:
        symbols: contiguous.
        groups: their steps.
        out: contiguous, of the same shape; may have the memory of the symbols.
    """
    wide = arithmetic_dtype(out.dtype)
    direct = wide == out.dtype and out.data_ptr() != symbols.data_ptr()
    if direct and len(groups.steps) == 1 and not len(groups.far):
        out.copy_(symbols).mul_(float(groups.steps[0]))
        return
    whole = symbols.numel() == groups.size * len(groups.steps) <= CHUNK
    if direct and whole and isinstance(groups.steps, torch.Tensor) and not len(groups.far):
        rows = out.copy_(symbols).view(len(groups.steps), groups.size)
        rows.mul_(groups.steps.to(wide).unsqueeze(1))
        return
    near, flat, used = symbols.reshape(-1), out.view(-1), 0
    for start, stop, step in _pieces(len(near), groups, wide):
        part, into = near[start:stop], flat[start:stop]
        exact = into.copy_(part) if direct else part.to(wide)
        if len(groups.far):
            mask = escape_mask(part)
            far = groups.far[used : used + int(np.count_nonzero(mask))]
            exact.numpy()[mask] = far.numpy()
            used += len(far)
        if isinstance(step, float):
            exact.mul_(step)
        else:
            exact.view(len(step), -1).mul_(step)
        if not direct:
            into.copy_(exact)


def dequantise_together(
    symbols: Sequence[torch.Tensor], groups: Sequence[SymbolGroups], dtype: torch.dtype
) -> tuple[torch.Tensor, Counts]:
    """Return what `dequantise` gives for several small tensors, end to end, and how many each has.

    Args:
        symbols: of one dtype.
        groups: of each.
        dtype: of the result.
    """
    wide = arithmetic_dtype(dtype)
    near, counts = joined(symbols)
    exact = near.to(wide)
    if any(each.far.numel() for each in groups):
        exact.numpy()[escape_mask(near)] = torch.cat([each.far for each in groups]).numpy()
    lengths: list[int] = []
    steps: list[torch.Tensor] = []
    for each, count in zip(groups, counts.tolist(), strict=True):
        number = len(each.steps)
        lengths += [each.size] * (number - 1)
        lengths.append(count - each.size * (number - 1))
        if isinstance(each.steps, torch.Tensor):
            steps.append(each.steps.to(wide))
    if steps:
        every = torch.cat(steps)
    else:
        every = torch.tensor([float(each.steps[0]) for each in groups], dtype=wide)
    exact.mul_(torch.repeat_interleave(every, torch.tensor(lengths)))
    return exact.to(dtype), counts


def _pieces(
    count: int, groups: SymbolGroups, wide: torch.dtype
) -> Iterator[tuple[int, int, float | torch.Tensor]]:
    """Yield ranges of values that lie in one group, with its step, or that are whole groups.

    For groups, the steps are a column of the given dtype.
    """
    size, steps = groups.size, groups.steps
    whole = count // size if 0 < size < CHUNK and len(steps) > 1 else 0
    for first in range(0, whole, max(1, CHUNK // max(size, 1))):
        last = min(first + CHUNK // size, whole)
        column = torch.as_tensor(steps[first:last], dtype=wide, device="cpu").unsqueeze(1)
        yield first * size, last * size, column
    for start in range(whole * size, count, max(size, 1)):
        end, step = min(start + size, count), float(steps[start // size])
        for piece in range(start, end, CHUNK):
            yield piece, min(piece + CHUNK, end), step


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


def _group_size(symbols: torch.Tensor, scope: str, block: int) -> int:
    if scope == PER_BLOCK:
        return block
    return symbols.numel() // max(symbols.shape[0], 1) if scope == PER_ROW else symbols.numel()


def _count_escapes(near: torch.Tensor) -> int:
    parts = in_chunks(near.reshape(-1))
    return sum(int(np.count_nonzero(escape_mask(part))) for (part,) in parts)


def _split_escaped(near: Sequence[torch.Tensor], far: torch.Tensor) -> Sequence[torch.Tensor]:
    """Return the escaped values of each tensor of symbols."""
    counts = [0] * len(near)
    small: dict[str, None] = {}
    for place, tensor in enumerate(near):
        if tensor.dtype != torch.int8:
            continue
        if tensor.nbytes > SMALL:
            counts[place] = _count_escapes(tensor)
        else:
            small[str(place)] = None
    for _, places in batches({place: near[int(place)] for place in small}, small):
        symbols, sizes = joined([near[int(place)] for place in places])
        before = np.concatenate([[0], np.cumsum(escape_mask(symbols))])
        ends = np.cumsum(sizes)
        for each, count in zip(places, before[ends] - before[ends - sizes], strict=True):
            counts[int(each)] = int(count)
    if sum(counts) != len(far):
        raise _malformed(f"{len(far)} values for {sum(counts)} symbols that escape")
    return torch.split(far, counts)


def _read_steps(
    packed: str,
    many: torch.Tensor,
    kinds: Sequence[tuple[torch.dtype, str]],
    counts: Sequence[int],
) -> list[Sequence[float] | torch.Tensor]:
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
    ones = iter(struct.unpack(form, raw))
    rest = [n for n, (_, letter) in zip(counts, kinds, strict=True) if letter != PER_TENSOR]
    groups = iter(torch.split(many, rest))
    wides = [arithmetic_dtype(dtype) for dtype, _ in kinds]
    _check_many(many, rest, [w for w, (_, s) in zip(wides, kinds, strict=True) if s != PER_TENSOR])
    bounds = {wide: (torch.finfo(wide).tiny, torch.finfo(wide).max) for wide in set(wides)}
    found: list[Sequence[float] | torch.Tensor] = []
    for (_, letter), wide in zip(kinds, wides, strict=True):
        if letter != PER_TENSOR:
            found.append(next(groups))
            continue
        step = next(ones)
        if not bounds[wide][0] <= step <= bounds[wide][1]:
            raise _abnormal(wide)
        found.append([step])
    return found


def _check_many(many: torch.Tensor, counts: Sequence[int], wides: Sequence[torch.dtype]) -> None:
    """Raise unless all steps are normal numbers; see `_check_steps`."""
    for wide in set(wides):
        mine = np.repeat([each == wide for each in wides], counts)
        _check_steps(many if mine.all() else many[torch.from_numpy(mine)], wide)


def _check_steps(steps: torch.Tensor, wide: torch.dtype) -> None:
    """Raise unless all steps are normal numbers of the type in which the products are computed."""
    kind = torch.finfo(wide)
    for (part,) in in_chunks(steps):
        exact = part.to(wide)
        low, high = map(float, torch.aminmax(exact)) if len(exact) else (1.0, 1.0)
        if not kind.tiny <= low <= high <= kind.max or not torch.equal(exact.to(part.dtype), part):
            raise _abnormal(wide)


def _abnormal(wide: torch.dtype) -> PayloadError:
    return _malformed(f"a step that is no normal number of {wide}")


def _malformed(what: str) -> PayloadError:
    return PayloadError(f"stage 'quantise': the notes do not fit the tensors: {what}")
