"""Makes the hooks of `harness.results` known to pytest, and picks the framework's tests.

Flower and FedML cannot share an environment: each runs the tests of the one that is installed.
"""

from importlib.util import find_spec

import torch

from harness.results import pytest_configure, pytest_runtest_makereport, result

__all__ = ["pytest_configure", "pytest_runtest_makereport", "result"]

torch.set_num_threads(1)

FLOWER = ["deployment", "private_wire", "simulation", "supernode_killed"]
collect_ignore_glob = []
if find_spec("flwr") is None:
    collect_ignore_glob += [f"test_{name}.py" for name in FLOWER]
if find_spec("fedml") is None:
    collect_ignore_glob += ["test_fedml_*.py"]
