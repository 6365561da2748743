"""Adapters inside of a model, such as those of PEFT, which stay dense.

They are small already, start from values of their own (LoRA's B is zero), and PEFT merges and saves
them by their names and shapes.
"""

from __future__ import annotations

from torch import nn

__all__ = ["why_adapter"]

PREFIXES = (
    *("lora_", "poly_lora_", "randlora_", "vblora_", "hada_", "lokr_", "ia3_", "vera_", "oft_"),
    *("boft_", "fourierft_", "waveft_", "hra_", "bone_", "miss_", "shira_", "c3a_", "road_"),
    *("ln_tuning_", "trainable_tokens_", "prompt_encoder", "adaption_prompt", "adaptation_prompt"),
)
"""Beginnings of the attributes in which PEFT's tuner layers keep what they train (peft 0.17)."""

_PACKAGE = "peft.tuners."


def why_adapter(name: str, layer: nn.Module) -> str:
    """Return why a layer stays dense because it is a part of an adapter (for the report), or "".

    Args:
        name: the layer's name in the model.
        layer: the layer.
    """
    part = next((part for part in name.split(".") if part.startswith(PREFIXES)), "")
    if not part and type(layer).__module__.startswith(_PACKAGE):
        part = type(layer).__name__
    if not part:
        return ""
    return (
        f"a part of an adapter ({part}), which is small already and starts from values of its own; "
        f"name it in include to factorise it all the same"
    )
