"""`fedpara report`: the ledgers of several runs as one self-contained page with plots.

The plots are SVG written here, in the page itself. A plotting library would be the heaviest
dependency of the core for one command, its pictures would neither follow the reader's dark mode nor
stay text, and the page needs only two kinds of plain charts. May import the ledger, ``support`` and
the rooms below. Offers a reader of ledgers and the function that renders the page.
"""

from __future__ import annotations

from fedpara_plugins.ledger.page.page import render_page
from fedpara_plugins.ledger.page.runs import DIRECTIONS, RunData, read_run, read_runs

__all__ = ["DIRECTIONS", "RunData", "read_run", "read_runs", "render_page"]
