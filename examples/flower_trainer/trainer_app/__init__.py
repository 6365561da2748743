"""Federated fine-tuning of a vision transformer: a Flower app with Hugging Face's Trainer."""
