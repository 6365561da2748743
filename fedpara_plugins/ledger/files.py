"""Writer and reader of a ledger's lines as JSON lines or CSV.

In both formats a ledger line is one physical line, since names are escaped. A file that is cut at
any byte loses only its last line.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedpara_plugins.errors import ConfigError, FedParaError
from fedpara_plugins.ledger.records import KINDS, LedgerEntry, LedgerLine
from fedpara_plugins.support.regular_files import check_regular
from fedpara_plugins.text import printable, shortened

__all__ = [
    "CSV_HEAD",
    "encode",
    "is_csv",
    "line_of",
    "numbered_lines",
    "prepare_to_append",
    "read_lines",
    "torn_bytes",
]

logger = logging.getLogger(__name__)

_FIELDS = {word: [field.name for field in fields(kind)] for word, kind in KINDS.items()}
_KIND_WORDS = {kind: word for word, kind in KINDS.items()}
COLUMNS = ("line", *dict.fromkeys(name for names in _FIELDS.values() for name in names))
CSV_HEAD = ",".join(COLUMNS)

FORMULA = re.compile(r"((?:^|;) *)([=+@-])")
"""First characters of a cell that spreadsheets compute; tabs and newlines are escaped anyway. Where
the decimal mark is a comma, a semicolon begins a new cell."""
LONGEST_LINE = 2**20
"""Most bytes of a line that are read, its newline included."""

_NUMBERS = {f.name for kind in KINDS.values() for f in fields(kind) if f.type == "int"}
_WHOLE = re.compile(r"-?[0-9]{1,19}")


def is_csv(path: Path) -> bool:
    """Return whether the suffix asks for CSV; every other suffix means JSON lines."""
    return path.suffix.lower() == ".csv"


# Writing


def encode(line: LedgerLine, *, as_csv: bool) -> str:
    """Return the line as text, with its newline."""
    word = _KIND_WORDS[type(line)]
    values = {name: getattr(line, name) for name in _FIELDS[word]}
    if as_csv:
        return _csv_text({"line": word, **values})
    if word != "message":
        values = {"line": word, **values}
    return json.dumps(values, separators=(",", ":")) + "\n"


def _csv_text(values: dict[str, Any]) -> str:
    cells = [_cell(values.get(name)) for name in COLUMNS]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        # Escaped as in a JSON string, without control characters, quotes and non-ASCII characters.
        text = json.dumps(value)[1:-1]
        # A spreadsheet takes these for a formula, whoever wrote them; escaped, they are text.
        return FORMULA.sub(lambda found: f"{found[1]}\\u{ord(found[2]):04x}", text)
    return repr(value)


# Reading


def read_lines(path: Path | str) -> Iterator[LedgerLine]:
    """Yield the lines of a file of either format, whatever its suffix.

    A killed run may leave an unfinished last line; it is ignored, with a warning in the log.

    Raises:
        FedParaError: another line is not a ledger's, or there is no finished line; the message
            names file and line.
        OSError: the file cannot be read.
    """
    empty = True
    as_csv = False
    for number, text in numbered_lines(path):
        empty = False
        if number == 1 and text.startswith(b"line,"):
            as_csv = True
            if text.decode(errors="replace") != CSV_HEAD:
                raise FedParaError(
                    f"{path}, line 1: expected the columns {CSV_HEAD}, got {text[:200]!r}"
                )
            continue
        yield line_of(text, path, number, as_csv)
    if empty:
        raise FedParaError(f"{path}: holds no whole line; expected a ledger")


def numbered_lines(path: Path | str) -> Iterator[tuple[int, bytes]]:
    """Yield the finished lines of a file, without newlines, numbered from 1.

    Raises:
        ConfigError: the path leads to no regular file.
        FedParaError: a line is longer than `LONGEST_LINE`.
        OSError: the file cannot be read.
    """
    check_regular(Path(path))
    with Path(path).open("rb") as file:
        for number, text in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if len(text) > LONGEST_LINE:
                raise FedParaError(
                    f"{path}, line {number}: expected at most {LONGEST_LINE} bytes, as every "
                    "ledger's line has; is it a ledger?"
                )
            if not text.endswith(b"\n"):
                logger.warning("%s: the last line is torn and was ignored", path)
                return
            yield number, text[:-1]


def line_of(text: bytes, path: Path | str, number: int, as_csv: bool) -> LedgerLine:
    """Return a line from its text without the newline.

    Raises:
        FedParaError: it is not a ledger's; the message names file and line.
    """
    word = "message"
    try:
        values = _csv_values(text) if as_csv else json.loads(text)
        if not isinstance(values, dict):
            raise TypeError("not an object")
        word = values.pop("line", word)
        if word not in KINDS:
            raise ValueError(f"unknown kind {word!r}; was it written by a newer version?")
        return KINDS[word](**values)
    except (TypeError, ValueError, RecursionError, csv.Error) as error:
        named = word if isinstance(word, str) and word in KINDS else "message"
        what = "ledger entry" if KINDS[named] is LedgerEntry else f"ledger line of kind {named!r}"
        got = printable(shortened(f"got {text[:60]!r}: {error}", 400))
        raise FedParaError(
            f"{path}, line {number}: expected a {what} with {', '.join(_FIELDS[named])}, {got}"
        ) from error


def _csv_values(text: bytes) -> dict[str, Any]:
    cells = next(csv.reader([text.decode("ascii")], strict=True), [])
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} of {len(COLUMNS)} columns")
    row = dict(zip(COLUMNS, cells, strict=True))
    names = _FIELDS.get(row["line"], [])
    foreign = [name for name in COLUMNS[1:] if row[name] and name not in names]
    if names and foreign:
        raise ValueError(f"unexpected value in column {foreign[0]!r}")
    return {"line": row["line"], **{name: _value(name, row[name]) for name in names}}


def _value(name: str, cell: str) -> Any:
    if name == "value":
        return float(cell) if cell else None
    if name not in _NUMBERS:
        return json.loads(f'"{cell}"')
    if not _WHOLE.fullmatch(cell):
        raise ValueError(f"{name}: expected a whole number, got {cell[:30]!r}")
    return int(cell)


# Continuing


def torn_bytes(path: Path) -> int:
    """Return the number of bytes after the last finished line."""
    with path.open("rb") as file:
        position = end = file.seek(0, io.SEEK_END)
        while position:
            start = max(0, position - 2**16)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return end - (start + found + 1)
            position = start
        return end


def prepare_to_append(path: Path) -> None:
    """Cut off an unfinished last line, so that the next line does not continue it.

    Raises:
        ConfigError: the file's format is not the one that its suffix asks for.
    """
    if torn := torn_bytes(path):
        logger.warning("%s: cut off a torn last line of %d bytes", path, torn)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - torn)
    with path.open("rb") as file:
        start = file.read(5)
    if start and is_csv(path) != (start == b"line,"):
        raise ConfigError(
            f"{path}: cannot continue it as {'CSV' if is_csv(path) else 'JSON lines'}, it begins "
            f"with {start!r}: the file is of another kind. Choose another name for the ledger."
        )
