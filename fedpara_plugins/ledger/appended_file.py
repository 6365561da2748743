"""A ledger's file while a run appends to it, on a disk that may refuse."""

from __future__ import annotations

import contextlib
import errno
import stat
from pathlib import Path

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.ledger.files import (
    CSV_HEAD,
    encode,
    is_csv,
    line_of,
    prepare_to_append,
)
from fedpara_plugins.ledger.records import LedgerLine
from fedpara_plugins.support.outages import Outages, cause_of, is_misplaced

__all__ = ["AppendedFile"]


class AppendedFile:
    """Appends lines to a file; a line is in it whole, or not at all.

    Args:
        path: of the file.
        outages: what the disk refuses is noted there, and later lines are tried again. None raises
            the system's error.

    Raises:
        FedParaError: the existing file's format is not the one that its suffix asks for, or
            something else is in its place.
        OSError: the file cannot be written, and there are no ``outages``.
    """

    def __init__(self, path: Path, outages: Outages | None = None) -> None:
        self._path = path
        self._outages = outages
        self._start = 0
        self._sound = False
        try:
            self._prepare()
            self._start = self._path.stat().st_size if self._path.exists() else 0
        except OSError as error:
            self._refused(error, at_start=True)

    def append(self, line: LedgerLine) -> None:
        """Append a line."""
        try:
            if not self._sound:
                self._prepare()
            self._write(line)
        except OSError as error:
            self._sound = False
            self._refused(error)

    def appended(self) -> list[LedgerLine]:
        """Return the lines that were appended by this object, in order."""
        if not self._path.is_file():
            return []
        as_csv, lines = is_csv(self._path), []
        with self._path.open("rb") as file:
            file.seek(self._start)
            for number, text in enumerate(file, start=1):
                if not (as_csv and number == 1 and not self._start):  # the head
                    lines.append(line_of(text.rstrip(b"\n"), self._path, number, as_csv))
        return lines

    def _prepare(self) -> None:
        """Make the folder, and cut off what a killed process left of a line."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            self._check_kind()
            prepare_to_append(self._path)
        self._sound = True

    def _check_kind(self) -> None:
        mode = self._path.stat().st_mode
        if stat.S_ISDIR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode):
            raise OSError(errno.EISDIR, "a folder, pipe or socket is in its place")

    def _write(self, line: LedgerLine) -> None:
        as_csv = is_csv(self._path)
        with self._path.open("ab", buffering=0) as file:
            before = file.tell()
            text = encode(line, as_csv=as_csv)
            if as_csv and not before:
                text = f"{CSV_HEAD}\n{text}"
            data = memoryview(text.encode())
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)  # a disk that is full had room for half of it
                raise

    def _refused(self, error: OSError, *, at_start: bool = False) -> None:
        if self._outages is None:
            raise error
        if at_start and is_misplaced(error):
            raise ConfigError(
                f"fedpara: the ledger {self._path} cannot be a file ({cause_of(error)}): choose "
                f"another name for it"
            ) from error
        so = "training goes on, and the ledger lacks lines from here"
        self._outages.note("the ledger", self._path, error, so)
