"""Records of a message, and their tensors."""

import pytest
import torch

from fedpara_plugins import PayloadError
from fedpara_plugins.exchange.records import cast, check_finite, plain_spec


def test_integers_are_rounded_and_floats_are_not():
    assert cast(torch.tensor([1.6, -0.4]), torch.int64).tolist() == [2, 0]
    value = torch.tensor([1.6])
    assert cast(value, torch.float32) is value


def test_the_first_tensor_that_is_not_finite_is_named():
    check_finite({"a": torch.ones(2), "n": torch.arange(3)})
    bad = torch.tensor([1.0, float("nan"), float("-inf")])
    with pytest.raises(PayloadError, match="'b' holds 2 NaN or infinite values of 3"):
        check_finite({"a": torch.ones(2), "b": bad, "c": bad})


def test_tensors_of_no_model_have_nothing_private():
    spec = plain_spec(iter(["a", "b"]))
    assert spec.keys == spec.shared_keys == ("a", "b")
    assert not spec.private_keys
