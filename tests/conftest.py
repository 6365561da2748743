"""What all tests of the core share: how hypothesis draws its examples."""

import os

from hypothesis import settings

# A gate that draws other examples every time refuses changes that have nothing to do with what it
# found. The search for new ones: `FEDPARA_EXPLORE=1 tox run -e core-py311`, and `tox run -e fuzz`.
settings.register_profile("steady", derandomize=True)
if not os.environ.get("FEDPARA_EXPLORE"):
    settings.load_profile("steady")
