"""`fedpara report`: ledgers of several runs as one page with plots, which needs nothing else.

The plots are SVG written here, in the page itself. A plotting library would be the heaviest
dependency of the core for one command, its pictures would neither follow the reader's dark mode nor
stay text, and four kinds of plain charts are all that is needed.
"""

from __future__ import annotations

from fedpara_plugins.ledger.page.page import render_page
from fedpara_plugins.ledger.page.runs import RunData, read_runs

__all__ = ["RunData", "read_runs", "render_page"]
