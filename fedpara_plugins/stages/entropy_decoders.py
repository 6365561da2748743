"""Which entropy stages this installation can decode."""

from __future__ import annotations

from fedpara_plugins.stages.entropy_zstd import zstd_available

__all__ = ["decoders"]


def decoders() -> tuple[str, ...]:
    """Return the names of the entropy stages that this installation can decode.

    The other side may encode with any of them. ``zlib`` comes first and is always included;
    ``zstd`` is included if the library ``zstandard`` can be imported.
    """
    return ("zlib", "ans", "zstd") if zstd_available() else ("zlib", "ans")
