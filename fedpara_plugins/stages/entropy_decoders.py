"""Which entropy stages this installation can decode."""

from __future__ import annotations

from fedpara_plugins.stages.entropy_zstd import zstd_available

__all__ = ["decoders"]


def decoders() -> tuple[str, ...]:
    """Names for the other side, which may code with any of them: ``zlib`` first, always there.

    ``zstd`` is among them where the library ``zstandard`` can be imported.
    """
    return ("zlib", "ans", "zstd") if zstd_available() else ("zlib", "ans")
