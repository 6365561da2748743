"""Sample state dicts with the corner cases of codecs."""

from __future__ import annotations

import torch

from fedpara_plugins.stages.stage import DTYPES, REAL_DTYPES, Tensors, tensor_bytes

__all__ = ["SAMPLE_NAMES", "finite_sample", "nearby", "same_bits"]

SAMPLE_NAMES = ("plain", "halves", "buffers", "corners", "extremes", "strided", "nothing")


def finite_sample(name: str) -> Tensors:
    """Return the sample with one of `SAMPLE_NAMES`, equal at every call; all values are finite."""
    draw = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    if name == "plain":
        return {"z.weight": normal(8, 5), "a.weight": normal(4, 3, 2, 2), "z.bias": normal(8)}
    if name == "halves":
        kinds = (torch.float16, torch.bfloat16, torch.float64)
        return {str(kind): normal(6, 3).to(kind) for kind in kinds}
    if name == "buffers":
        whole = {
            key: torch.arange(5).to(dtype)
            for key, dtype in DTYPES.items()
            if dtype not in REAL_DTYPES
        }
        return {**whole, "batches": torch.tensor(12), "temperature": torch.tensor(0.1)}
    if name == "corners":
        return {
            "zeros": torch.zeros(3, 2),
            "empty": torch.empty(0, 4),
            "one": normal(1),
            "": -normal(2),
        }
    if name == "extremes":
        top, least = torch.finfo(torch.float32).max, torch.finfo(torch.float32).smallest_normal
        half = torch.finfo(torch.float16).max
        return {
            "large": torch.tensor([top, -top / 3, 1.0]),
            "small": torch.tensor([least / 8, -least, 0.0, -0.0]),
            "half": torch.tensor([half, -half / 5], dtype=torch.float16),
            "brain": torch.tensor([torch.finfo(torch.bfloat16).max, 1.0], dtype=torch.bfloat16),
        }
    if name == "strided":
        base = normal(6, 4)
        return {
            "turned": base.T,
            "every other": base[::2, 1:3],
            "repeated": normal(3, 1).expand(3, 4),
        }
    if name == "nothing":
        return {}
    raise KeyError(name)


def nearby(tensors: Tensors) -> Tensors:
    """Return a reference for ``tensors``: floating values times 0.75, all others equal."""
    return {
        name: tensor * 0.75 if tensor.dtype in REAL_DTYPES else tensor.clone()
        for name, tensor in tensors.items()
    }


def same_bits(one: Tensors, other: Tensors) -> bool:
    """Return whether names, their order, dtypes, shapes and bytes are equal; NaN equals itself."""
    return list(one) == list(other) and all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and tensor_bytes(a) == tensor_bytes(b)
        for a, b in zip(one.values(), other.values(), strict=True)
    )
