"""The server's part of a run: encode what strategies send, decode replies, count bytes, resume.

Imports: ``factories``, ``run``, ``privacy``, ``messages`` and the root modules.
Offers: `app.server_app`, which wraps the user's ServerApp, and `evaluation.log_metrics`. The other
modules serve `app`: the Grid between strategy and engine, hooks around ``Strategy.start``, the
ledger, snapshots of completed rounds, and the final model.
"""
