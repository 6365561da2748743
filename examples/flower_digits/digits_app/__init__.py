"""Federated learning of handwritten digits: a Flower app with PyTorch."""
