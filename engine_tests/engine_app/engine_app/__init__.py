"""A Flower app for the engine tests; `harness.deployment` copies the matrix's ``task.py`` in."""
