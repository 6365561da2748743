"""The version, in lockstep with the core."""

__version__ = "0.1.0"
