"""What all tests of the core share."""

import hypothesis_profiles  # noqa: F401
