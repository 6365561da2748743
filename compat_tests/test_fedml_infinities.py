"""Infinities that belong to a model, a persistent causal mask of ``-inf``, through whole runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpara_plugins.codecs import PRESETS
from harness.fedml.optimizer_cases import CASES, run_case

METHODS = ("none", "lowrank", "fedpara", "pfedpara")
MASK = torch.full((32, 32), float("-inf")).triu(1)


class Masked(nn.Module):
    """Each input is mixed with those before it."""

    def __init__(self, *, persistent: bool = True) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.hidden = nn.Linear(32, 64)
        self.out = nn.Linear(64, 4)
        self.register_buffer("mask", MASK.clone(), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        """Mix, then classify."""
        mask: Tensor = self.mask  # type: ignore[assignment]
        scores = x.unsqueeze(2) * x.unsqueeze(1) / 8
        mixed = torch.softmax(scores + mask, dim=-1) @ x.unsqueeze(2)
        logits: Tensor = self.out(torch.tanh(self.hidden(mixed.squeeze(2))))
        return logits


class MaskedTrainer(ModelTrainerCLS):  # type: ignore[misc]
    """FedML's own, which looks at the mask that arrived."""

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        """Train as ever."""
        assert torch.equal(self.model.mask, MASK)
        super().train(train_data, device, args)


def _assert_masked(state: dict[str, Tensor]) -> None:
    assert torch.equal(state["mask"], MASK)
    assert all(torch.isfinite(value).all() for name, value in state.items() if name != "mask")


@pytest.mark.in_turn
@pytest.mark.parametrize("name", ["fedavg", "fedopt-adam"])
@pytest.mark.parametrize("codec", PRESETS)
@pytest.mark.parametrize("method", METHODS)
def test_a_mask_is_the_same_at_the_end_and_in_the_checkpoint(
    method: str, codec: str, name: str, tmp_path: Path
) -> None:
    path = tmp_path / "dense.safetensors"
    keys = {"fedpara_codec": codec, "fedpara_checkpoint": str(path), "comm_round": 3, "epochs": 1}
    outcome = run_case(CASES[name], method, Masked(), client_trainer=MaskedTrainer, **keys)
    _assert_masked(outcome.state)
    _assert_masked(load_file(path))


OTHERS = [
    "fedprox",
    "fedopt-momentum",
    "fedopt-flower-yogi",
    "scaffold-rate",
    "feddyn",
    "fednova-momentum",
    "mime",
]


@pytest.mark.in_turn
@pytest.mark.parametrize("name", OTHERS)
def test_all_other_tensors_are_what_they_are_without_a_mask_in_the_state(name: str) -> None:
    keys = {"fedpara_codec": "small", "comm_round": 3, "epochs": 1}
    found = run_case(CASES[name], "none", Masked(), **keys)
    wanted = run_case(CASES[name], "none", Masked(persistent=False), **keys)
    _assert_masked(found.state)
    for key, value in wanted.state.items():
        assert torch.equal(found.state[key], value), key


def test_a_parameter_that_becomes_infinite_leaves_that_client_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Diverging(MaskedTrainer):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            super().train(train_data, device, args)
            if self.id == 1:
                self.model.out.bias.data[2] = float("inf")

    keys = {"fedpara_codec": "small", "comm_round": 2, "client_num_per_round": 4, "epochs": 1}
    caplog.set_level(logging.WARNING, logger="fedpara.fedml")
    outcome = run_case(CASES["fedavg"], "fedpara", Masked(), client_trainer=Diverging, **keys)
    _assert_masked(outcome.state)
    said = [r.getMessage() for r in caplog.records if "left out client 1 " in r.getMessage()]
    assert len(said) == 2
    assert "'out.bias' holds 1 NaN or infinite values of 4" in said[0]
