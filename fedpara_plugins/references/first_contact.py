"""How whole weights are coded, for a client that holds nothing that was sent before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from fedpara_plugins.codecs import parse_codec
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references.version_zero import SEEDED, ZEROS, Base, BaseKind, base_of
from fedpara_plugins.stages.stage import REAL_DTYPES

__all__ = ["Bases", "fine_codec"]

FINE = "delta+quantise:rms=0.001953125"
KEPT = 4
"""Bases that a server keeps: two kinds, and a model that changes now and then."""


def fine_codec(codec: Codec) -> Codec:
    """The chain for whole weights in place of one that is made for small updates.

    Quantisers and sparsifiers give way to steps of 1/512 of a tensor's root mean square; the
    entropy coder stays. A chain without any stays as it is.
    """
    coarse = [s for s in codec.stages if not (s.lossless or s.needs_reference or s.name == "cast")]
    if not coarse:
        return codec
    entropy = tuple(stage for stage in codec.stages if stage.entropy)
    return Codec((*parse_codec(FINE).stages, *entropy), entropy=codec.entropy)


class Bases:
    """Version 0 and zeros for the models that a server sends, each derived once."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, str], Base] = OrderedDict()

    def get(self, kind: BaseKind, spec: ModelSpec, like: Mapping[str, Tensor]) -> Base:
        """See `base_of`."""
        shapes = str([(name, value.dtype, tuple(value.shape)) for name, value in like.items()])
        key = (kind, spec.fingerprint, shapes)
        if key not in self._known:
            self._known[key] = base_of(kind, spec, like)
        self._known.move_to_end(key)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return self._known[key]

    def nearest(self, spec: ModelSpec, state: Mapping[str, Tensor]) -> Base:
        """Version 0, or zeros where they are nearer to the state.

        They are to weights from elsewhere, and to what is no model (an optimizer's variates, which
        begin at zero): steps follow the size of the difference, so the nearer base leaves less
        error.
        """
        seeded = self.get(SEEDED, spec, state)
        gain = sum(
            float((value.double().square() - (value.double() - base.double()).square()).sum())
            for name, value in state.items()
            if value.dtype in REAL_DTYPES
            for base in [seeded.tensors[name]]
        )
        return seeded if gain > 0 else self.get(ZEROS, spec, state)
