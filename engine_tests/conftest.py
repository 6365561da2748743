"""Makes the hooks of `harness.results` known to pytest."""

import torch

from harness.results import pytest_configure, pytest_runtest_makereport, result

__all__ = ["pytest_configure", "pytest_runtest_makereport", "result"]

torch.set_num_threads(1)
