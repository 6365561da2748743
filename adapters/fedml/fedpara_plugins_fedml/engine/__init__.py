"""The engine of a run: what servers and clients do with models, whatever carries the messages.

Imports: ``rules``, ``messages`` and the root modules (``settings``, ``seams``, ``logs``).
Offers: `server` and `client`, the two sides; `models` (conversion), `evaluation` (tests on the
server). The other modules serve these.
"""
