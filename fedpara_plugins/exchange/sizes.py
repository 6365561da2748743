"""The size of a message before coding, for the ledger."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.models.spec import ModelSpec

__all__ = ["Size", "codec_text", "size_of", "tensor_bytes"]


@dataclass(frozen=True)
class Size:
    """The size of a message before coding.

    Attributes:
        tensors: number of tensors that are sent.
        raw: their bytes.
        dense: bytes of the same part of the dense model.
    """

    tensors: int = 0
    raw: int = 0
    dense: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.tensors + other.tensors, self.raw + other.raw, self.dense + other.dense)


def size_of(shared: Mapping[str, Tensor], spec: ModelSpec) -> Size:
    """Return the size of tensors that are sent, which belong to the model of ``spec``."""
    return Size(len(shared), tensor_bytes(shared), spec.dense_bytes(shared))


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of all values."""
    return sum(value.numel() * value.element_size() for value in tensors.values())


def codec_text(config: FedParaConfig) -> str:
    """Return a run's codecs as text, for the ledger's first line."""
    up, down = config.uplink_codec or config.codec, config.downlink_codec or config.codec
    return up if up == down else f"up {up}, down {down}"
