"""The version, in one place: the distributions of this repository move in lockstep."""

__version__ = "0.1.0"
