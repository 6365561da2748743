"""Nested values as plain JSON and tensors."""

import math

import numpy as np
import pytest
import torch

from fedpara_plugins.exchange.plain_values import pack_plain, unpack_plain


def same(one, other):
    if isinstance(one, torch.Tensor | np.ndarray | np.generic):
        return type(one) is type(other) and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and all(map(same, one, other))
    return type(one) is type(other) and (one == other or (one != one and other != other))


VALUE = {
    "moments": {"a": torch.arange(3.0), 7: np.arange(2)},
    "number": np.float64(2.5),
    "rest": [1, 2.5, "x", None, True, (math.inf, math.nan), {}],
}


def test_nested_values_come_back_as_they_were():
    tensors = {}
    packed = pack_plain(VALUE, tensors)
    assert same(unpack_plain(packed, tensors), VALUE)
    assert all(type(value) is torch.Tensor for value in tensors.values())


def test_a_kind_that_cannot_be_kept_is_named():
    with pytest.raises(TypeError, match="cannot keep a set"):
        pack_plain({"names": [{1, 2}]}, {})


def test_other_kinds_are_kept_by_whoever_knows_them():
    tensors = {}

    def others(value):
        return ("complex", [value.real, value.imag]) if isinstance(value, complex) else None

    packed = pack_plain({"z": [1 + 2j]}, tensors, others)
    assert unpack_plain(packed, tensors, {"complex": lambda pair: complex(*pair)}) == {
        "z": [1 + 2j]
    }
