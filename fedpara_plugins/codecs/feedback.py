"""Error feedback: what a lossy codec lost in one payload is added to what the next one sends.

    payload, residual = encode_with_feedback(
        state, codec=codec, reference=received, residual=residual
    )

The sum of what the receiver decodes then stays within one payload's error of the sum of what was
meant, however coarse the steps (Seide et al. 2014, "1-bit stochastic gradient descent"; Karimireddy
et al. 2019, "Error feedback fixes SignSGD").
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.payload import write_payload
from fedpara_plugins.codecs.plain import plain
from fedpara_plugins.codecs.reference import digest_of
from fedpara_plugins.stages.stage import REAL_DTYPES, Tensors, byte_size

__all__ = ["encode_with_feedback"]

logger = logging.getLogger(__name__)


def encode_with_feedback(
    tensors: Mapping[str, torch.Tensor],
    *,
    codec: Codec,
    reference: Mapping[str, torch.Tensor] | None,
    residual: Mapping[str, torch.Tensor] | None,
    digest: str | None = None,
    model: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> tuple[bytes, Tensors]:
    """Code named tensors into bytes, and say what was lost.

    Where ``codec.feedback`` is False, this is `encode_payload` and an empty residual. Where the
    chain in use loses nothing (first contact), the residual is sent with the tensors and is empty
    afterwards.

    Args:
        tensors: dense; neither modified nor kept.
        codec: as for `encode_payload`.
        reference: what the receiver holds too, or None.
        residual: what this function returned last time, if that payload was used; entries that do
            not fit ``tensors`` are dropped and counted in the log.
        digest: as for `encode_payload`.
        model: JSON for the receiver to compare with its own model.
        extra: any other JSON of the caller.

    Returns:
        The payload, and for each float tensor that lost something: what was wanted minus what the
        receiver decodes, float32 (float64 for float64 tensors), finite, of the tensor's shape.

    Raises:
        PayloadError: as `encode_payload`; the residual given is then still the one to keep.
        MismatchError: the reference does not fit the tensors.
    """
    chain = codec.resolved(None)
    if chain.needs_reference and reference is None:
        chain = chain.first_contact()
    against = plain(reference) if chain.needs_reference and reference is not None else None
    named = None if against is None else digest_of(against, digest)
    sent = plain(tensors)
    totals = _totals(sent, residual) if codec.feedback and residual else {}
    wanted = {name: totals[name][0] if name in totals else x for name, x in sent.items()}
    inner, outer = _halves(chain)
    coded, notes = inner.encode(wanted, reference=against)
    stream, more = outer.encode(coded, reference=against)
    payload = write_payload(
        stream, [*notes, *more], codec=chain, reference=named, model=model, extra=extra
    )
    if not codec.feedback or chain.lossless:
        return payload, {}
    size = sum(byte_size(tensor.dtype, tensor.shape) for tensor in sent.values())
    back = inner.decode(coded, notes, reference=against, limit=size)
    exact = {name: totals[name][1] if name in totals else x for name, x in sent.items()}
    return payload, _lost(exact, back)


def _halves(chain: Codec) -> tuple[Codec, Codec]:
    """The stages that may lose something, and the entropy coder, which need not be undone."""
    last = len(chain.stages)
    while last and chain.stages[last - 1].entropy and chain.stages[last - 1].lossless:
        last -= 1
    return Codec(chain.stages[:last]), Codec(chain.stages[last:])


def _totals(
    sent: Tensors, residual: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Tensor plus residual, in the tensor's dtype and exactly, where the residual fits."""
    totals = {}
    for name, tensor in sent.items():
        rest = residual.get(name)
        if rest is None or tensor.dtype not in REAL_DTYPES or rest.shape != tensor.shape:
            continue
        exact = tensor.to(_wide(tensor.dtype)) + rest.detach().to("cpu", _wide(tensor.dtype))
        total = exact.to(tensor.dtype)
        # What is not finite by itself is for the codec to refuse, with the tensor's own values.
        if bool(torch.isfinite(total).all()):
            totals[name] = (total, exact)
    if dropped := [name for name in residual if name not in totals]:
        logger.warning(
            "error feedback: dropped what was lost of %d of %d tensors (%s): it is of another "
            "model or shape, or not finite",
            len(dropped), len(residual), ", ".join(map(repr, dropped[:3])),
        )  # fmt: skip
    return totals


def _lost(exact: Tensors, back: Tensors) -> Tensors:
    """What was wanted minus what arrives, for the tensors that lost something; always finite."""
    lost: Tensors = {}
    for name, tensor in exact.items():
        if back[name].dtype not in REAL_DTYPES:
            continue
        rest = tensor.to(_wide(back[name].dtype)) - back[name].to(_wide(back[name].dtype))
        rest = torch.nan_to_num_(rest, nan=0.0, posinf=0.0, neginf=0.0)
        if bool(rest.any()):
            lost[name] = rest
    return lost


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
