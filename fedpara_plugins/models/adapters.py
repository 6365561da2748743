"""Adapters inside of a model, such as those of PEFT, which stay dense.

They are small already, start from values of their own (LoRA's B is zero), and PEFT merges and saves
them by their names and shapes. PEFT saves its copies of whole layers so as well.
"""

from __future__ import annotations

from torch import nn

__all__ = ["in_adapter", "why_adapter"]

PREFIXES = (
    *("lora_", "poly_lora_", "randlora_", "vblora_", "hada_", "lokr_", "ia3_", "vera_", "oft_"),
    *("boft_", "fourierft_", "waveft_", "hra_", "bone_", "miss_", "shira_", "c3a_", "road_"),
    *("adamss_", "beft_", "cartridge_", "deft_", "delora_", "frod_", "glora_", "gralora_", "hira_"),
    *("lily_", "osf_", "peanut_", "poly_router", "psoft_", "pvera_", "tinylora_"),
    *("unilora_", "shadow_down", "shadow_up", "supertuning_", "ln_tuning_", "trainable_tokens_"),
    *("internal_xlora_classifier", "adaption_prompt", "adaptation_prompt", "prompt_encoder"),
)
"""Beginnings of the attributes in which PEFT keeps what it trains (peft 0.17 to 0.21)."""

_COPIES = "modules_to_save"

_PACKAGE = "peft.tuners."


def in_adapter(name: str) -> bool:
    """Return whether a tensor's name is that of a part of an adapter."""
    return any(part.startswith(PREFIXES) for part in name.split("."))


def why_adapter(name: str, layer: nn.Module) -> str:
    """Return why a layer stays dense because it is a part of an adapter (for the report), or "".

    Args:
        name: the layer's name in the model.
        layer: the layer.
    """
    parts = name.split(".")
    if _COPIES in parts:
        return (
            f"a layer that PEFT trains and saves as a whole ({_COPIES}); name it in include to "
            f"factorise it all the same, in which case PEFT cannot save it"
        )
    part = next((part for part in parts if part.startswith(PREFIXES)), "")
    if not part and type(layer).__module__.startswith(_PACKAGE):
        part = type(layer).__name__
    if not part:
        return ""
    return (
        f"a part of an adapter ({part}), which is small already and starts from values of its own; "
        f"name it in include to factorise it all the same"
    )
