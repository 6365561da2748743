"""The ways in which FedML runs a project: one process, or several over a transport.

Imports: ``checks``, ``engine``, ``rules``, ``transport`` and the root modules.
Offers: `single_process.SingleProcess` and `distributed.Distributed`, which have the method ``run``
that FedML's runner calls.
"""
