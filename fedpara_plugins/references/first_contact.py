"""The coding of whole weights, for a client that holds nothing that was sent before."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from fedpara_plugins.codecs import parse_codec
from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references.version_zero import (
    SEEDED,
    ZEROS,
    DerivedKind,
    DerivedReference,
    derive_reference,
)
from fedpara_plugins.stages.stage import REAL_DTYPES

__all__ = ["DerivedReferences", "fine_codec"]

FINE_STAGES = "delta+quantise:rms=0.001953125"
CACHED = 4
"""Derived references that a server keeps: two kinds each for the last two models."""


def fine_codec(codec: Codec) -> Codec:
    """Return a chain for whole weights in place of one that is made for small updates.

    Steps of 1/512 of a tensor's root mean square replace quantisers and sparsifiers; the entropy
    coder stays. A chain without quantisers and sparsifiers stays as it is.
    """
    coarse = [s for s in codec.stages if not (s.lossless or s.needs_reference or s.name == "cast")]
    if not coarse:
        return codec
    entropy = tuple(stage for stage in codec.stages if stage.entropy)
    return Codec((*parse_codec(FINE_STAGES).stages, *entropy), entropy=codec.entropy)


class DerivedReferences:
    """Version 0 and zeros for the models that a server sends, each derived once."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, str, str], DerivedReference] = OrderedDict()

    def get(
        self, kind: DerivedKind, spec: ModelSpec, like: Mapping[str, Tensor]
    ) -> DerivedReference:
        """Return what `derive_reference` gives for these arguments."""
        shapes = str([(name, value.dtype, tuple(value.shape)) for name, value in like.items()])
        key = (kind, spec.fingerprint, shapes)
        if key not in self._known:
            self._known[key] = derive_reference(kind, spec, like)
        self._known.move_to_end(key)
        while len(self._known) > CACHED:
            self._known.popitem(last=False)
        return self._known[key]

    def nearest(self, spec: ModelSpec, state: Mapping[str, Tensor]) -> DerivedReference:
        """Return version 0, or zeros if they are nearer to the state.

        Zeros are nearer to weights from elsewhere, and to tensors of no model (an optimizer's
        variates, which start at zero). Steps follow the size of the difference, so the nearer
        reference leaves less error.
        """
        seeded = self.get(SEEDED, spec, state)
        gain = sum(
            _gain(value.double(), seeded.tensors[name].double())
            for name, value in state.items()
            if value.dtype in REAL_DTYPES
        )
        return seeded if gain > 0 else self.get(ZEROS, spec, state)


def _gain(exact: Tensor, drawn: Tensor) -> float:
    """Return by how much drawn values are nearer than zeros; infinities, as in a mask, count 0."""
    nearer = exact.square() - (exact - drawn).square()
    return float(nearer.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).sum())
