"""FedML with the options that nobody sets, against a plain loop with the clip written out."""

from __future__ import annotations

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from torch import Tensor

from fedpara_plugins import ModelSpec, convert
from harness.fedml.project import dataset, model, run
from harness.oracles.fedml_rules import PlainLoop
from harness.oracles.relative_clip import SHARES, clipped, he, usual_norms

RATE = 2.0
"""High enough for the clip to act."""


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_the_default_clip_is_the_rule_written_out(method: str) -> None:
    """The model has no norm layers, so that its variance is He's."""
    net = convert(model(), method=method, gamma=0.5)
    norms = usual_norms(net, method, he)
    acted: list[bool] = []

    class Clipped(PlainLoop):
        everywhere = True

        def direction(self, client: int, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
            held = clipped(name, weight, gradient, rate=self.lr, share=SHARES[method], norms=norms)
            acted.append(held is not gradient)
            return held

    loop = Clipped(net, dataset()[5], private=ModelSpec.of(net).initial_private(), lr=RATE)
    wanted = loop.run(3, 2)
    # An empty text is the default, which the harness switches off elsewhere.
    keys = {"fedpara_method": method, "fedpara_gamma": 0.5, "fedpara_clip": ""}
    found = run(**keys, fedpara_mend=True, learning_rate=RATE).state
    assert sum(acted) > len(acted) / 50
    for name, value in wanted.items():  # float32, with norms that are summed in another order
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
