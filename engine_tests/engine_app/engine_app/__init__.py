"""A Flower app for the engine tests; `harness.flower.deployment` copies the matrix's ``task.py`` in."""
