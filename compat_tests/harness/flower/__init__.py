"""Flower apps for tests, and ways to run them.

It imports Flower, the Flower adapter, `harness.cells`, `harness.oracles` and `harness.processes`.
It offers apps with and without the plugin (`apps`, `drift_apps`, `legacy_apps`), a Grid in this
process (`inprocess_grid`), and Flower's engines as real processes (`deployment`, `engine_app`).
"""
