"""Federated LoRA fine-tuning of a language model: a Flower app with PEFT."""
