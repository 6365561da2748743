"""Checks before a run begins. They refuse what the plugin cannot run, and what would fail later.

Imports: ``rules`` and the root modules (``settings``, ``environment``, ``seams``, ``logs``).
Offers: `arguments` (keys and the data set), `supported` (modes and optimizers), `files` (paths that
must be writable), `announcement` (the log line that says what differs from FedML).
"""
