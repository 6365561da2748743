"""FedML's runs reach the golden weights, which Flower's runs reach too."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

from torch import Tensor

from harness.fedml.project import run
from harness.fedml.task_dataset import task_dataset, task_keys
from harness.oracles.golden_weights import CASES, METHODS, OPTIONS, TASK, check, loop, net


def federated(name: str, method: str) -> Mapping[str, Tensor]:
    keys = {
        **task_keys(TASK),
        "fedpara_mend": True,
        "fedpara_method": method,
        **{f"fedpara_{key}": value for key, value in OPTIONS[method].items()},
    }
    return run(net=net(), data=task_dataset(TASK), **{**keys, **CASES[name].fedml}).state


@pytest.mark.in_turn
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CASES)
def test_fedml_reaches_the_golden_weights(name: str, method: str) -> None:
    check(name, method, federated(name, method))


@pytest.mark.parametrize("name", CASES)
def test_the_file_is_what_the_plain_loop_writes(name: str) -> None:
    check(name, "pfedpara", dict(loop(name, "pfedpara")) | {"private": net().fc2.bias.detach() * 0})
