"""A Flower app for the engine tests; `harness.flower.deployment` adds the matrix's ``task.py``."""
