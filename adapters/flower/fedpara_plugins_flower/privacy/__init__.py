"""Privacy mechanisms of Flower beside the plugin: clipping for differential privacy, and SecAgg+.

Imports: ``messages`` and the root modules (``settings``, ``logs``, ``seams``).
Offers: `clipping` and `secagg`, whose checks refuse combinations that would break the mechanism,
and what client and server do with messages of the SecAgg+ protocol.
"""
