"""Fine-tuning of trained weights in FedML: the residual form, and runs that would lose them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from safetensors.torch import load_file

from fedpara_plugins import ConfigError, ModelSpec, convert
from harness.fedml.project import dataset, model, run
from harness.oracles.fedml_fedavg import FedAvgLoop

METHODS = ("lowrank", "fedpara", "pfedpara")


def trained() -> torch.nn.Module:
    """The project's model with the few strong directions that training gives."""
    net = model()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if name == "0.weight":
                u, v = torch.randn(weight.shape[0], 2), torch.randn(2, weight.shape[1])
                weight.add_(u @ v * weight.std())
    return net


@pytest.mark.parametrize("train", ["both", "right"])
@pytest.mark.parametrize("method", METHODS)
def test_trained_weights_get_an_update_by_default(method: str, train: str, tmp_path: Path) -> None:
    """Which equals a plain loop; the export is the dense model."""
    net = convert(trained(), method=method, gamma=0.5, base="frozen", train=train, speed=0.25)
    spec = ModelSpec.of(net)
    loop = FedAvgLoop(net, dataset()[5], private=spec.initial_private())
    wanted = loop.run(3, 2)
    path = tmp_path / "dense.safetensors"
    outcome = run(
        net=trained(), fedpara_method=method, fedpara_gamma=0.5, fedpara_train=train,
        fedpara_checkpoint=str(path), fedpara_speed=0.25,
    )  # fmt: skip
    for name, value in wanted.items():
        torch.testing.assert_close(outcome.state[name], value, rtol=1e-5, atol=1e-6)
    assert "0.weight_base" in outcome.state
    torch.testing.assert_close(outcome.state["0.weight_base"], trained().state_dict()["0.weight"])
    dense = load_file(path)
    assert dense.keys() == trained().state_dict().keys()
    assert not torch.equal(dense["0.weight"], trained().state_dict()["0.weight"])


@pytest.mark.parametrize("keys", [{"fedpara_init": "seeded"}, {"fedpara_base": "factors"}])
def test_a_run_that_would_lose_trained_weights_does_not_begin(keys: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match=r"fedpara_init.*'0\.weight'.*base='frozen'.*discard"):
        run(net=trained(), fedpara_method="fedpara", fedpara_gamma=0.5, **keys)
    outcome = run(
        net=trained(), fedpara_method="fedpara", fedpara_gamma=0.5, fedpara_trained="discard",
        **keys,
    )  # fmt: skip
    assert "0.weight_base" not in outcome.state
