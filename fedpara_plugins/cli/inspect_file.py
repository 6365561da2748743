"""`fedpara inspect`: a description of an untrusted file; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from fedpara_plugins.codecs import (
    Notes,
    PayloadHeader,
    Stage,
    Tensors,
    decode_payload,
    peek_header,
)
from fedpara_plugins.codecs.compact import MAGIC
from fedpara_plugins.codecs.description import NO_DESCRIPTION
from fedpara_plugins.errors import FedParaError, PayloadError
from fedpara_plugins.ledger import CSV_HEAD, Direction, LedgerTotals
from fedpara_plugins.ledger.page import DIRECTIONS, read_run
from fedpara_plugins.models.checkpoint_files import METADATA_KEY, read_about
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.plugins import stages
from fedpara_plugins.stages.dtypes import DTYPES, byte_size, dtype_name
from fedpara_plugins.support.regular_files import check_regular
from fedpara_plugins.support.units import readable_bytes
from fedpara_plugins.text import printable, shortened

__all__ = ["inspect_file"]

EXPANSION = 64
"""A payload may decode to this many times its size; real ones stay well below."""

MOST_DECODED = 2**30
"""Bytes to which a small payload may decode."""

MOST_TENSORS = 2**14
"""Tensors that a payload may hold."""

LONGEST_TEXT = 400
"""Most characters of a stranger's text on a line."""

TensorRow = tuple[str, str, str, str]
"""Name, dtype, shape and bytes."""


def inspect_file(path: Path | str) -> str:
    """Return a description of a payload, of a factor or dense checkpoint, or of a ledger.

    Raises:
        PayloadError: the file is none of these, or damaged.
        FedParaError: a line of a ledger is malformed.
        OSError: the file cannot be read.
    """
    path = Path(path)
    check_regular(path)
    with path.open("rb") as file:
        start = file.read(9)
    try:
        if start[:1] == b"{" or start == CSV_HEAD[:9].encode():
            lines = list(_ledger_lines(path))
        elif start[: len(MAGIC)] == MAGIC:
            lines = list(_payload_lines(path))
        elif start[8:9] == b"{":
            lines = list(_safetensors_lines(path))
        else:
            raise PayloadError(_unknown_kind(path, start))
    except PayloadError as error:
        if str(error).startswith(str(path)):
            raise
        raise type(error)(f"{path}: {error}") from error
    except (FedParaError, OSError):
        raise
    except (ArithmeticError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as e:
        # The readers check descriptions; this catches what their checks have missed.
        raise PayloadError(f"{path}: invalid content: {e!r}") from e
    return "\n".join(lines)


def _unknown_kind(path: Path, start: bytes) -> str:
    text = f"{path}: neither a safetensors file nor a ledger"
    if start[:2] in (b"PK", b"\x80\x02"):
        text += "; it looks like a file of torch.save, which `fedpara export` reads"
    return text


# safetensors files


def _safetensors_lines(path: Path) -> Iterator[str]:
    about = read_about(path)
    if "crc32" in about:
        yield from _payload_lines(path)
        return
    kind = {"factors": "factor checkpoint", "dense": "dense checkpoint"}.get(
        str(about.get("format")), f"safetensors file without a {METADATA_KEY} description"
    )
    keys_held, rows = _stored_rows(path)
    yield f"{printable(path.name)}: {kind}, {readable_bytes(path.stat().st_size)}"
    for key in ("model", "method", "version", "config"):
        if isinstance(value := about.get(key), str | dict) and (key, kind[0]) != ("model", "f"):
            yield f"  {key}: {_short(str(value))}"
    if about.get("format") == "factors":
        keys = tuple(map(str, about["keys"]))
        spec = ModelSpec.from_json(about["model"], keys)
        yield from _model_lines(spec)
        if spec.private_keys:
            both = keys_held & spec.private_keys
            yield f"  private factors: {len(both)} of {len(spec.private_keys)} in the file"
    yield from _table(rows)


def _stored_rows(path: Path) -> tuple[set[str], list[TensorRow]]:
    """Return the names of a file's tensors, and a row for each."""
    with safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return set(slices), [
            _row(name, part.get_dtype(), tuple(part.get_shape()), _stored_size(part))
            for name, part in slices.items()
        ]


def _stored_size(part: Any) -> int | None:
    dtype = DTYPES.get(part.get_dtype())
    return None if dtype is None else byte_size(dtype, tuple(part.get_shape()))


def _payload_lines(path: Path) -> Iterator[str]:
    data = path.read_bytes()
    header = peek_header(data)
    version = f"payload of format version {header.version}"
    yield f"{printable(path.name)}: {version}, {len(data):,} bytes"
    yield f"  sender: fedpara-plugins {_short(header.plugin_version)}"
    if header.description not in (None, NO_DESCRIPTION):
        yield from _partial_lines(header)
        return
    limit = min(EXPANSION * len(data) + 2**20, max(2 * len(data), MOST_DECODED))
    payload = decode_payload(
        data, limit=limit, stages=_without_references(stages()), most_tensors=MOST_TENSORS
    )
    tensors = payload.tensors
    size = sum(byte_size(t.dtype, t.shape) for t in tensors.values())
    yield f"  codec: {_short(header.codec)}, for tensors of {size:,} bytes"
    yield f"  reference: {_short(header.reference or 'none')}"
    if header.extra is not None:
        yield f"  extra: {_short(str(dict(header.extra)))}"
    if header.model is not None:
        yield from _model_lines(ModelSpec.from_json(header.model, tuple(tensors)))
    else:
        yield "  model: not described"
    if header.reference is not None:
        yield "  The tensors are differences from the reference."
    yield from _table(_row_of(name, tensor) for name, tensor in tensors.items())


def _partial_lines(header: PayloadHeader) -> Iterator[str]:
    """Yield what a header says without the description that it refers to."""
    yield f"  codec: {_short(header.codec)}"
    yield f"  reference: {_short(header.reference or 'none')}"
    if header.extra is not None:
        yield f"  extra: {_short(str(dict(header.extra)))}"
    yield (
        f"  description: {header.description}; it holds the model and the tensors' names and "
        f"shapes, and lies with the sides that exchanged this payload"
    )


class _PassThrough(Stage):
    """A replacement for a stage whose reference is missing: it leaves tensors encoded."""

    lossless = False

    def __init__(self, name: str) -> None:
        self.name = name

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, Notes]:
        """Return the tensors unchanged."""
        return tensors, {}

    def decode(
        self, tensors: Tensors, notes: Notes, *, reference: Tensors | None, limit: int
    ) -> Tensors:
        """Return the tensors unchanged; such stages come first and keep names, shapes, dtypes."""
        return tensors


def _without_references(known: Mapping[str, Stage]) -> dict[str, Stage]:
    return {
        name: _PassThrough(name) if stage.needs_reference else stage
        for name, stage in known.items()
    }


# Models and tensors


def _model_lines(spec: ModelSpec) -> Iterator[str]:
    yield (
        f"  model: {len(spec.keys)} names, {len(spec.weights)} factorised weights, "
        f"{len(spec.private_keys)} private factors; "
        f"fingerprint {spec.fingerprint}, seed {spec.seed}"
    )
    for weight, plan in spec.weights.items():
        shape = "x".join(map(str, plan.shape))
        text = f"{plan.method.name} rank {plan.rank}" + (", tanh" if plan.tanh else "")
        yield f"    {_short(weight)}: {shape}, {text}, scale {plan.scale:.6g}"


def _row_of(name: str, tensor: Tensor) -> TensorRow:
    size = byte_size(tensor.dtype, tensor.shape)
    return _row(name, dtype_name(tensor.dtype), tuple(tensor.shape), size)


def _row(name: str, dtype: str, shape: tuple[int, ...], size: int | None) -> TensorRow:
    counted = "?" if size is None else f"{size:,}"
    return (_short(name), dtype, "x".join(map(str, shape)) or "scalar", counted)


def _short(text: str) -> str:
    return printable(shortened(text, LONGEST_TEXT))


def _table(rows: Iterable[TensorRow]) -> Iterator[str]:
    every: list[TensorRow] = [("tensor", "dtype", "shape", "bytes"), *rows]
    widths = [max(len(row[i]) for row in every) for i in range(4)]
    for name, dtype, shape, size in every:
        yield (
            f"  {name.ljust(widths[0])}  {dtype.ljust(widths[1])}  {shape.ljust(widths[2])}  "
            f"{size.rjust(widths[3])}"
        )
    yield f"  {len(every) - 1} tensors"


# Ledgers


def _ledger_lines(path: Path) -> Iterator[str]:
    run = read_run("", path)
    numbers = sorted({number for number, _ in run.rounds})
    yield (
        f"{printable(path.name)}: ledger of {run.totals().totals.messages:,} messages, "
        f"{len(numbers):,} rounds, {len(run.client_names):,} clients"
    )
    yield "  round  direction  messages       bytes  uncoded bytes  dense bytes"
    for number in numbers:
        for direction in DIRECTIONS:
            if (found := run.rounds.get((number, direction))) is not None:
                yield _ledger_row(str(number), direction, found.totals)
    for direction in DIRECTIONS:
        if (totals := run.totals(direction).totals).messages:
            yield _ledger_row("all", direction, totals)


def _ledger_row(label: str, direction: Direction, totals: LedgerTotals) -> str:
    messages, _, raw, sent, dense = totals
    fewer = f"  ({dense / sent:.1f} times fewer than dense)" if sent and dense else ""
    return (
        f"  {label:>5}  {direction:<9}  {messages:>8,}  {sent:>10,}  {raw:>13,}  {dense:>11,}"
        f"{fewer}"
    )
