"""Records of a message, and their tensors."""

import torch

from fedpara_plugins.exchange.records import cast, plain_spec


def test_integers_are_rounded_and_floats_are_not():
    assert cast(torch.tensor([1.6, -0.4]), torch.int64).tolist() == [2, 0]
    value = torch.tensor([1.6])
    assert cast(value, torch.float32) is value


def test_tensors_of_no_model_have_nothing_private():
    spec = plain_spec(iter(["a", "b"]))
    assert spec.keys == spec.shared_keys == ("a", "b")
    assert not spec.private_keys
