"""The hooks of `harness.matrix.results`, and the choice of the installed framework's tests.

Flower and FedML cannot share an environment: each runs the tests of the one that is installed.
"""

from importlib.util import find_spec
from pathlib import Path

import torch

from harness.matrix.results import pytest_configure, pytest_runtest_makereport, result

__all__ = ["pytest_configure", "pytest_runtest_makereport", "result"]

torch.set_num_threads(1)

FOLDER = Path(__file__).parent
FEDML_TESTS = {path.name for path in FOLDER.glob("test_fedml_*.py")}
FLOWER_TESTS = {path.name for path in FOLDER.glob("test_*.py")} - FEDML_TESTS

collect_ignore: list[str] = []
if find_spec("flwr") is None:
    collect_ignore += FLOWER_TESTS
if find_spec("fedml") is None:
    collect_ignore += FEDML_TESTS
