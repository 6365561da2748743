"""Models in the frameworks that own a training loop: Lightning and Hugging Face.

Imports: ``oracles``. Offers: `apps`, which needs these frameworks.
"""
