"""Makes the fixture and the hooks of `harness.results` known to pytest."""

import torch

from harness.results import pytest_configure, pytest_runtest_makereport, result

__all__ = ["pytest_configure", "pytest_runtest_makereport", "result"]

# The models are tiny: more threads only wait for each other.
torch.set_num_threads(1)
