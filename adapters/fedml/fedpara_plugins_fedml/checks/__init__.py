"""Checks before a run begins: what the plugin cannot run, or would fail later, is refused at once.

Imports: ``rules`` and the ground floor (``settings``, ``environment``, ``seams``, ``logs``).
Offers: `arguments` (keys and the data set), `supported` (modes and optimizers), `files` (paths that
must be writable), `announcement` (the log line that says what differs from FedML).
"""
