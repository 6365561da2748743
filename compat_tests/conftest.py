"""The fixture and hooks of `harness.matrix`, and the choice of the installed framework's tests.

Flower and FedML cannot share an environment: each runs the tests of the one that is installed. The
tests of training loops run where Lightning is installed, those of recipes with Flower and PEFT.
"""

import os
import tempfile
from importlib.util import find_spec

import hypothesis_profiles  # noqa: F401
import torch

from harness.matrix.results import pytest_configure, pytest_runtest_makereport, result
from harness.matrix.smoke import pytest_collection_modifyitems

__all__ = [
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_runtest_makereport",
    "result",
]

# The models are tiny: more threads only wait for each other.
torch.set_num_threads(1)

collect_ignore_glob = []
if find_spec("lightning") is None:
    collect_ignore_glob += ["test_loop_*.py"]
if find_spec("flwr") is None or find_spec("peft") is None:
    collect_ignore_glob += ["test_recipe*.py"]
if find_spec("flwr") is None:
    collect_ignore_glob += ["test_flower_*.py"]
if find_spec("fedml") is None:
    collect_ignore_glob += ["test_fedml_*.py"]
else:
    # FedML keeps files in the home folder that override the environment, and asks a server on the
    # internet for its configuration unless it is told not to.
    _home = tempfile.TemporaryDirectory(prefix="fedpara-home-")
    os.environ["HOME"] = _home.name
    os.environ["FEDML_ENV_VERSION"] = "local"
