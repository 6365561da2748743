"""The search for private values: what it finds, and that it finds nothing by chance."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from harness.cells.flower import CODECS
from harness.processes.canaries import Canaries

WIDTHS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def _values(seed: int, *shape: int) -> Tensor:
    return 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _bytes(value: Tensor, *, swapped: bool = False) -> bytes:
    kind = {torch.bfloat16: torch.int16}.get(value.dtype, value.dtype)
    array = value.contiguous().view(kind).numpy()
    return (array.byteswap() if swapped else array).tobytes()


@pytest.mark.parametrize("swapped", [False, True], ids=["little", "big"])
@pytest.mark.parametrize("width", WIDTHS, ids=str)
def test_raw_values_of_any_width_are_found_at_any_offset(width: torch.dtype, swapped: bool) -> None:
    secret, noise = _values(1, 40, 7), os.urandom(20_000)
    canaries = Canaries([secret])
    for offset in range(9):
        data = noise[: 1000 + offset] + _bytes(secret.to(width), swapped=swapped) + noise[1000:]
        assert canaries.found_in(data) >= 272
    part = _bytes(secret.flatten()[100:120].to(width), swapped=swapped)
    assert canaries.found_in(noise + part + noise) >= 12


def test_other_values_are_not_found() -> None:
    canaries = Canaries([_values(1, 300, 40), torch.zeros(500), torch.ones(500)])
    other = _values(2, 300, 400)
    for width in WIDTHS:
        assert canaries.found_in(_bytes(other.to(width))) == 0
    assert canaries.found_in(bytes(10_000)) == canaries.found_in(b"") == 0
    assert canaries.found_in(_bytes(torch.ones(500)) * 3) == 0
    assert canaries.found_among({"other": other, "ones": torch.ones(500)}) == []


def test_what_both_sides_know_is_no_secret() -> None:
    first = _values(1, 100)
    moved = torch.cat([first[:50], _values(2, 50)])
    canaries = Canaries([moved], known=[first])
    assert canaries.found_in(_bytes(first)) == 0
    assert canaries.found_in(_bytes(moved)) == 49
    assert Canaries([first], known=[first]).found_among({"a": first}) == []


@pytest.mark.parametrize("form", ["whole", "sorted", "shuffled", "part", "inside", "cast"])
def test_values_in_decoded_tensors_are_found_in_any_order(form: str) -> None:
    secret = _values(1, 64, 32)
    rng = np.random.default_rng(0)
    flat = secret.flatten()
    found = {
        "whole": secret.T,
        "sorted": flat.sort().values,
        "shuffled": flat[torch.from_numpy(rng.permutation(len(flat)))],
        "part": flat[300:500],
        "inside": torch.cat([_values(2, 5000), flat, _values(3, 5000)]),
        "cast": secret.half(),
    }[form]
    canaries = Canaries([_values(9, 50), secret])
    assert canaries.found_among({"other": _values(4, 64, 32), "here": found}) == ["here"]


@pytest.mark.parametrize("codec", CODECS)
def test_values_are_found_in_what_a_receiver_decodes(codec: str) -> None:
    """Under the name of a shared tensor, coded against that one, which the receiver holds."""
    held, secret = {"shared": _values(1, 80, 25)}, _values(2, 80, 25)
    chain = parse_codec(codec)
    payload = encode_payload({"shared": secret}, codec=chain, reference=held)
    decoded = decode_payload(payload, reference=held, limit=10**6).tensors
    assert Canaries([secret]).found_among(decoded) == ["shared"]
    honest = {"shared": held["shared"] + 0.1 * _values(3, 80, 25)}
    payload = encode_payload(honest, codec=chain, reference=held)
    decoded = decode_payload(payload, reference=held, limit=10**6).tensors
    assert Canaries([secret]).found_among(decoded) == []
