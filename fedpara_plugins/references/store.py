"""States by their hash: in memory up to a limit, the rest in files."""

from __future__ import annotations

import logging
import tempfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fedpara_plugins.codecs import decode_payload, encode_payload, reference_hash
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.stage import Tensors
from fedpara_plugins.support.outages import Outages
from fedpara_plugins.support.private_files import (
    make_private_folder,
    remove_leftovers,
    replace_file,
    set_aside,
)

__all__ = ["ReferenceStore"]

log = logging.getLogger("fedpara.references")

MEMORY_BYTES = 256 * 2**20
SUFFIX = ".safetensors"
UNFINISHED = ("*.tmp", "*.partial")

NEWEST = 4
"""States that stay in memory, above its limit too, if the disk refuses them: answers to the
messages of this moment are coded against them."""


class ReferenceStore(Mapping[str, Tensors]):
    """States of tensors by their `reference_hash`, read like a dict.

    Memory contains the states that were used last. With a folder every state is written there at
    once, so that a server that was killed finds it again. Without a folder, only states that exceed
    the memory go to a temporary one. A file whose content has another hash than its name says
    counts as missing. What the disk refuses stays in memory; if it is full, the states that were
    used longest ago are lost.

    Args:
        memory_bytes: size of the tensors kept in memory; one more state while it is being read.
        folder: for the files, created if it is missing; nothing else may write there. Its owner
            alone can read it.
        outages: gets what cannot be written; None logs it alone.

    Raises:
        ConfigError: something else is in the folder's place.
    """

    def __init__(
        self,
        *,
        memory_bytes: int = MEMORY_BYTES,
        folder: Path | None = None,
        outages: Outages | None = None,
    ) -> None:
        self._limit = memory_bytes
        self._memory: OrderedDict[str, Tensors] = OrderedDict()
        self._used = 0
        self._persistent = folder is not None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = folder
        self._files: set[str] = set()
        self._outages = outages or Outages(log)
        self._refused = False
        if folder is not None:
            try:
                if not folder.parent.exists():
                    make_private_folder(folder.parent)
                make_private_folder(folder)
            except OSError as error:
                self._note(error)
            else:
                remove_leftovers(folder, UNFINISHED)
            self._files = set(self._sound_names(folder))

    def _sound_names(self, folder: Path) -> Iterator[str]:
        for path in list(folder.glob(f"*{SUFFIX}")):
            if path.is_file() and not path.is_symlink():
                yield path.stem
                continue
            try:
                set_aside(path, "it is not a file", "it counts as lost")
            except OSError as error:
                log.warning("fedpara: %s is no file and is passed over: %s", path, error)

    # Reading

    def __getitem__(self, digest: str) -> Tensors:
        if digest not in self._memory:
            self._remember(digest, self._read(digest))
        found = self._memory.pop(digest)
        self._memory[digest] = found
        self._evict()
        return dict(found)

    def __contains__(self, digest: object) -> bool:
        return digest in self._memory or digest in self._files

    def __iter__(self) -> Iterator[str]:
        return iter({**dict.fromkeys(self._memory), **dict.fromkeys(self._files)})

    def __len__(self) -> int:
        return len(self._files | self._memory.keys())

    @property
    def memory_used(self) -> int:
        """Return the size in bytes of the tensors in memory."""
        return self._used

    @property
    def is_short(self) -> bool:
        """Return whether the disk refuses states, and memory has no room for two more.

        A state that is added now may cost another one that an answer is coded against.
        """
        largest = max(map(_size, self._memory.values()), default=0)
        return self._refused and self._used + 2 * largest > self._limit

    # Writing

    def add(self, tensors: Mapping[str, Tensor], *, digest: str | None = None) -> str:
        """Keep a copy of a state.

        Args:
            tensors: of any dtype that can travel.
            digest: their hash, if the caller knows it.

        Returns:
            The hash.
        """
        digest = digest or reference_hash(tensors)
        if digest not in self:
            state = {name: value.detach().cpu().clone() for name, value in tensors.items()}
            if self._persistent:
                self._write(digest, state)
            self._remember(digest, state)
            self._evict()
        return digest

    def discard(self, digest: str) -> None:
        """Delete a state and its file, if they exist."""
        state = self._memory.pop(digest, None)
        self._used -= _size(state or {})
        if digest in self._files:
            self._files.discard(digest)
            try:
                self._path(digest).unlink(missing_ok=True)
            except OSError as error:
                log.warning("fedpara: the file of reference %s stays: %s", digest, error)

    def retain(self, digests: Collection[str]) -> None:
        """Delete every other state."""
        for digest in set(self) - set(digests):
            self.discard(digest)

    def close(self) -> None:
        """Free the memory and remove the temporary folder, if there is one."""
        self._memory.clear()
        self._used = 0
        if self._temporary is not None:
            self._temporary.cleanup()

    # Memory and files

    def _remember(self, digest: str, state: Tensors) -> None:
        self._memory[digest] = state
        self._used += _size(state)

    def _evict(self) -> None:
        while self._used > self._limit and self._memory:
            digest, state = next(iter(self._memory.items()))
            if digest not in self._files and not self._write(digest, state):
                if len(self._memory) <= NEWEST:
                    return
                log.info("fedpara: reference %s is lost: memory is full, and the disk", digest)
            del self._memory[digest]
            self._used -= _size(state)

    def _path(self, digest: str) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fedpara-references-")
            self._folder = Path(self._temporary.name)
        return self._folder / f"{digest}{SUFFIX}"

    def _write(self, digest: str, state: Tensors) -> bool:
        """Write a state's file; return whether the disk took it."""
        try:
            # A reader, or a server that starts again, sees the whole file or none.
            replace_file(self._path(digest), encode_payload(state, codec=Codec(())), private=True)
        except OSError as error:
            self._note(error)
            return False
        self._refused = False
        self._files.add(digest)
        return True

    def _note(self, error: OSError) -> None:
        self._refused = True
        where = self._folder or tempfile.gettempdir()
        so = "training goes on with those in memory; if it is full, with full coded downlinks"
        self._outages.note("references", where, error, so)

    def _read(self, digest: str) -> Tensors:
        if digest not in self._files:
            raise KeyError(digest)
        try:
            data = self._path(digest).read_bytes()
            state = decode_payload(data, limit=len(data)).tensors
            intact = reference_hash(state) == digest
        except (OSError, PayloadError) as error:
            log.warning("fedpara: %s: %s", self._path(digest), error)
            intact = False
        if not intact:
            log.warning("fedpara: the file of reference %s is damaged and counts as lost", digest)
            self.discard(digest)
            raise KeyError(digest)
        return state


def _size(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())
