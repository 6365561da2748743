"""The stages of a codec, one file for each stage or entropy coder.

A stage maps named tensors to named tensors and notes, and back. `Stage` in ``stages.stage`` is the
contract that every stage fulfils. May import ``support``, ``text`` and ``errors``. Offers
`BUILTIN_STAGES` and the contract's types; everybody else imports these from the face
`fedpara_plugins.codecs`.
"""

from __future__ import annotations

from fedpara_plugins.stages.cast import CastStage
from fedpara_plugins.stages.delta import DeltaStage
from fedpara_plugins.stages.entropy_ans import AnsStage
from fedpara_plugins.stages.entropy_zlib import ZlibStage
from fedpara_plugins.stages.entropy_zstd import ZstdStage
from fedpara_plugins.stages.grid import GridStage
from fedpara_plugins.stages.int8 import Int8Stage
from fedpara_plugins.stages.planes import PlanesStage
from fedpara_plugins.stages.quantise import QuantiseStage
from fedpara_plugins.stages.stage import Notes, Stage, Tensors
from fedpara_plugins.stages.topk import TopkStage

__all__ = ["BUILTIN_STAGES", "Notes", "Stage", "Tensors"]

BUILTIN_STAGES: tuple[Stage, ...] = (
    DeltaStage(),
    Int8Stage(),
    ZlibStage(),
    ZstdStage(),
    AnsStage(),
    GridStage(),
    CastStage(),
    QuantiseStage(),
    TopkStage(),
    PlanesStage(),
)
"""The stages that this distribution registers through ``fedpara_register_stages``."""
