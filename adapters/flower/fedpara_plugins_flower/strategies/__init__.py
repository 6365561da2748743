"""The strategies SCAFFOLD and FedDyn, and the correction of a client's steps.

Imports: ``client`` (storage), ``run``, ``messages`` and the root modules; the arithmetic is the
core's (`fedpara_plugins.optimizers`).
Offers: `scaffold.Scaffold`, `feddyn.FedDyn` and `correction.correction`.
"""
