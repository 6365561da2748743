"""The hash of a reference, which both sides compute from the tensors that they hold."""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping

import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.dtypes import dtype_name, tensor_bytes

__all__ = ["digest_of", "reference_hash"]


def reference_hash(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of a state as 64 hexadecimal digits, whatever the order of the names.

    It covers for each tensor, in the order of the names' UTF-8 bytes: the length of the name, the
    name, the length of the dtype's name, that name, the number of dimensions, each dimension, and
    the tensor's bytes. All numbers are little-endian, unsigned and 64 bits wide.

    Raises:
        PayloadError: a dtype cannot be sent.
    """
    digest = hashlib.sha256()
    by_name = sorted((name.encode("utf-8", "surrogatepass"), name) for name in tensors)
    for encoded, name in by_name:
        tensor = tensors[name]
        dtype = dtype_name(tensor.dtype).encode("ascii")
        for text in (encoded, dtype):
            digest.update(struct.pack("<Q", len(text)) + text)
        digest.update(struct.pack(f"<{tensor.ndim + 1}Q", tensor.ndim, *tensor.shape))
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def digest_of(tensors: Mapping[str, torch.Tensor], known: str | None) -> str:
    """Return the hash of a state: the known one, or else a computed one.

    Raises:
        PayloadError: a dtype cannot be sent, or ``known`` is no hash.
    """
    if known is None:
        return reference_hash(tensors)
    if not (isinstance(known, str) and re.fullmatch("[0-9a-f]{64}", known)):
        raise PayloadError(
            f"digest: expected reference_hash of the reference, 64 hexadecimal digits, got "
            f"{str(known)[:80]!r}; leave it out to have it computed"
        )
    return known
