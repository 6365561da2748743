"""How hypothesis draws its examples, in all tests.

A gate that draws other examples every time refuses changes that have nothing to do with what it
found. The search for new ones: `FEDPARA_EXPLORE=1 tox run -e core-py311`, and `tox run -e fuzz`.
Neither profile has a limit of time: the speed of a machine says nothing about what is tested.
"""

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("explore", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("explore" if os.environ.get("FEDPARA_EXPLORE") else "steady")
