"""States by their hash: in memory up to a limit, the rest in files."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from fedpara_plugins.codecs import decode_payload, encode_payload, reference_hash
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.stage import Tensors

__all__ = ["ReferenceStore"]

log = logging.getLogger("fedpara.references")

MEMORY_BYTES = 256 * 2**20
SUFFIX = ".safetensors"
UNFINISHED = ".tmp"


class ReferenceStore(Mapping[str, Tensors]):
    """States of tensors by their `reference_hash`, read like a dict.

    Memory contains the states that were used last. With a folder every state is written there at
    once, so that a server that was killed finds it again. Without a folder, only states that exceed
    the memory go to a temporary one. A file whose content has another hash than its name says
    counts as missing.

    Args:
        memory_bytes: size of the tensors kept in memory; one more state while it is being read.
        folder: for the files, created if it is missing; nothing else may write there.
    """

    def __init__(self, *, memory_bytes: int = MEMORY_BYTES, folder: Path | None = None) -> None:
        self._limit = memory_bytes
        self._memory: OrderedDict[str, Tensors] = OrderedDict()
        self._used = 0
        self._persistent = folder is not None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = folder
        self._files: set[str] = set()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for unfinished in folder.glob(f"*{UNFINISHED}"):
                unfinished.unlink()
            self._files = {path.stem for path in folder.glob(f"*{SUFFIX}")}

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
            self._path(digest).unlink(missing_ok=True)

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
            if digest not in self._files:
                self._write(digest, state)
            del self._memory[digest]
            self._used -= _size(state)

    def _path(self, digest: str) -> Path:
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="fedpara-references-")
            self._folder = Path(self._temporary.name)
        return self._folder / f"{digest}{SUFFIX}"

    def _write(self, digest: str, state: Tensors) -> None:
        path = self._path(digest)
        unfinished = path.with_suffix(UNFINISHED)
        unfinished.write_bytes(encode_payload(state, codec=Codec(())))
        # A reader, or a server that starts again, sees the whole file or none.
        os.replace(unfinished, path)
        self._files.add(digest)

    def _read(self, digest: str) -> Tensors:
        if digest not in self._files:
            raise KeyError(digest)
        try:
            data = self._path(digest).read_bytes()
            state = decode_payload(data, limit=len(data)).tensors
            intact = reference_hash(state) == digest
        except (OSError, PayloadError) as error:
            log.warning("fedpara: %s", error)
            intact = False
        if not intact:
            log.warning("fedpara: the file of reference %s is damaged and counts as lost", digest)
            self.discard(digest)
            raise KeyError(digest)
        return state


def _size(state: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in state.values())
