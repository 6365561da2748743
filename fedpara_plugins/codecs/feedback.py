"""Error feedback: what a lossy codec lost in one payload is added to the next one.

    payload, residual = encode_with_feedback(
        state, codec=codec, reference=received, residual=residual
    )

The sum of what the receiver decodes then stays within one payload's error of the sum of the exact
tensors, however coarse the steps (Seide et al. 2014, "1-bit stochastic gradient descent";
Karimireddy et al. 2019, "Error feedback fixes SignSGD").
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from fedpara_plugins.codecs.chain import Codec
from fedpara_plugins.codecs.description import HeaderForm
from fedpara_plugins.codecs.payload import choose_codec, write_payload
from fedpara_plugins.codecs.plain import plain_tensors
from fedpara_plugins.stages.dtypes import REAL_DTYPES, arithmetic_dtype, byte_size
from fedpara_plugins.stages.stage import Tensors

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
    form: HeaderForm | None = None,
) -> tuple[bytes, Tensors]:
    """Encode named tensors as bytes, and return what was lost.

    If ``codec.feedback`` is False, this is `encode_payload` and the residual is empty. If the codec
    in use loses nothing (first contact), the residual is sent with the tensors and is then empty.

    Args:
        tensors: dense; neither modified nor kept.
        codec: as for `encode_payload`.
        reference: tensors that the receiver holds too, or None.
        residual: what the last call returned, if its payload was used. Entries that do not fit
            ``tensors`` are dropped and counted in the log.
        digest: as for `encode_payload`.
        model: JSON for the receiver to compare with its own model.
        extra: any other JSON of the caller.
        form: as for `encode_payload`.

    Returns:
        The payload; and for each floating-point tensor that lost something, the exact tensor minus
        the decoded one, as float32 (float64 for float64 tensors), finite, of the tensor's shape.

    Raises:
        PayloadError: as `encode_payload`; the caller then keeps the residual that it gave.
        MismatchError: the reference does not fit the tensors.
    """
    chain, against, named = choose_codec(codec, reference, digest)
    sent = plain_tensors(tensors)
    totals = _totals(sent, residual) if codec.feedback and residual else {}
    wanted = {name: totals[name][0] if name in totals else x for name, x in sent.items()}
    lossy, coder = _split_chain(chain)
    coded, notes = lossy.encode(wanted, reference=against)
    stream, more = coder.encode(coded, reference=against)
    payload = write_payload(
        stream, [*notes, *more], codec=chain, reference=named, model=model, extra=extra, form=form
    )
    if not codec.feedback or chain.lossless:
        return payload, {}
    size = sum(byte_size(tensor.dtype, tensor.shape) for tensor in sent.values())
    decoded = lossy.decode(coded, notes, reference=against, limit=size)
    exact = {name: totals[name][1] if name in totals else x for name, x in sent.items()}
    return payload, _lost(exact, decoded)


def _split_chain(chain: Codec) -> tuple[Codec, Codec]:
    """Return the stages that may lose something, and the entropy coder, which loses nothing."""
    last = len(chain.stages)
    while last and chain.stages[last - 1].entropy and chain.stages[last - 1].lossless:
        last -= 1
    return Codec(chain.stages[:last]), Codec(chain.stages[last:])


def _totals(
    sent: Tensors, residual: Mapping[str, torch.Tensor]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return tensor plus residual, in the tensor's dtype and exactly, if the residual fits."""
    totals = {}
    for name, tensor in sent.items():
        rest, wide = residual.get(name), arithmetic_dtype(tensor.dtype)
        if rest is None or tensor.dtype not in REAL_DTYPES or rest.shape != tensor.shape:
            continue
        exact = tensor.to(wide) + rest.detach().to("cpu", wide)
        total = exact.to(tensor.dtype)
        # Infinities of the tensor itself belong to the model; the codec refuses its NaN.
        if not bool((~torch.isfinite(total) & torch.isfinite(tensor)).any()):
            totals[name] = (total, exact)
    if dropped := [name for name in residual if name not in totals]:
        logger.warning(
            "error feedback: dropped the residuals of %d of %d tensors (%s): they are of another "
            "model or shape, or not finite",
            len(dropped), len(residual), ", ".join(map(repr, dropped[:3])),
        )  # fmt: skip
    return totals


def _lost(exact: Tensors, decoded: Tensors) -> Tensors:
    """Return the exact minus the decoded tensors where they differ; always finite."""
    lost: Tensors = {}
    for name, tensor in exact.items():
        if decoded[name].dtype not in REAL_DTYPES:
            continue
        wide = arithmetic_dtype(decoded[name].dtype)
        rest = tensor.to(wide) - decoded[name].to(wide)
        rest = torch.nan_to_num_(rest, nan=0.0, posinf=0.0, neginf=0.0)
        if bool(rest.any()):
            lost[name] = rest
    return lost
