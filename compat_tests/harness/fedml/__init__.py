"""A FedML project for tests, and ways to run it.

It imports FedML, the FedML adapter, `harness.cells`, `harness.oracles` and `harness.processes`. It
offers runs in this process (`project`), in threads (`threads`), and in real processes over FedML's
transports (`deployment`, with `taps` on the wire), and the optimizers' cases (`optimizer_cases`).
"""
