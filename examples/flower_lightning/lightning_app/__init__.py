"""Federated fine-tuning of a trained model: a Flower app with Lightning."""
