"""The command `fedpara`: one module a sub-command.

May import everything; nothing of the core imports it.
"""

from __future__ import annotations

from fedpara_plugins.cli.command import main

__all__ = ["main"]
