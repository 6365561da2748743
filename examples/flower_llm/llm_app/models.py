"""The language model with its adapter."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

VOCABULARY = 64


def get_model(config: Any) -> Any:
    """Load the model, freeze it, and put an adapter on it."""
    model = prepare_model_for_kbit_training(
        _base(str(config["model-name"]), int(config["quantization"])),
        use_gradient_checkpointing=bool(config["gradient-checkpointing"]),
    )
    lora = LoraConfig(
        r=config["lora-r"],
        lora_alpha=config["lora-alpha"],
        lora_dropout=0.075,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def _base(name: str, bits: int) -> Any:
    if name:
        quantised = (
            BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8) if bits else None
        )
        return AutoModelForCausalLM.from_pretrained(
            name, quantization_config=quantised, dtype=torch.bfloat16 if bits else torch.float32
        )
    with torch.random.fork_rng():  # the same frozen weights on every side
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_llama())


def tiny_llama() -> LlamaConfig:
    """Return the shape of Llama, small."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
