"""The command `fedpara`, with a module for each sub-command.

``command`` runs the sub-commands, ``arguments`` parses the command line; `fedpara report` itself is
in ``ledger.page``. May import every room but ``testing``, and no room imports it. Offers `main`.
"""

from __future__ import annotations

from fedpara_plugins.cli.command import main

__all__ = ["main"]
