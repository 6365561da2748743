"""The model as a server holds it."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins import ModelSpec, PayloadError
from fedpara_plugins.exchange import server_state, zero_private_factors


def test_a_servers_model_is_w1(helpers):
    model = helpers.converted(private="3.*")
    spec = ModelSpec.of(model)
    torch.nn.init.ones_(model.get_parameter("0.x2"))
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    zero_private_factors(model)
    after = model.state_dict()
    assert spec.private_factors == {"0.x2", "0.y2"}
    for name, value in before.items():
        same = torch.equal(after[name], value)
        assert same == (name not in spec.private_factors), name
    assert not after["0.x2"].any()


def test_a_state_from_its_shared_part_is_that_of_the_model(helpers):
    model = helpers.converted(private="3.*", seed=3)
    zero_private_factors(model)
    spec, state = ModelSpec.of(model), model.state_dict()
    found = server_state(spec, {key: state[key] for key in spec.shared_keys})
    assert tuple(found) == spec.keys
    assert all(torch.equal(found[name], state[name]) for name in spec.keys)
    with pytest.raises(PayloadError, match="missing"):
        server_state(spec, {key: state[key] for key in spec.shared_keys if key != "2.bias"})
