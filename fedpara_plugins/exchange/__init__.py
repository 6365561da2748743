"""What every adapter does with a message's tensors, on either side, whatever the framework.

A record is a named group of tensors in a message: the model, or an optimizer's variates beside it.
May import everything of the core but ``cli`` and ``testing``.
"""

from __future__ import annotations

from fedpara_plugins.exchange.client_state import ClientState, private_key
from fedpara_plugins.exchange.coding import (
    blind_limit,
    check_finite,
    check_names,
    codecs_of,
    decoders_of,
    difference,
    encode,
    fitting,
    loss_known,
    spec_of,
    update_codec,
)
from fedpara_plugins.exchange.dense_round import (
    DenseRound,
    check_agreement,
    converted_copy,
    refuse_in_factor_space,
    tell_idle,
)
from fedpara_plugins.exchange.downlink_encoder import DownlinkEncoder, cast
from fedpara_plugins.exchange.plain_values import pack_plain, unpack_plain
from fedpara_plugins.exchange.settings import ExchangeSettings, codecs_in_words, to_number
from fedpara_plugins.exchange.sizes import Size, codec_text, size_of

__all__ = [
    "ClientState",
    "DenseRound",
    "DownlinkEncoder",
    "ExchangeSettings",
    "Size",
    "blind_limit",
    "cast",
    "check_agreement",
    "check_finite",
    "check_names",
    "codec_text",
    "codecs_in_words",
    "codecs_of",
    "converted_copy",
    "decoders_of",
    "difference",
    "encode",
    "fitting",
    "loss_known",
    "pack_plain",
    "private_key",
    "refuse_in_factor_space",
    "size_of",
    "spec_of",
    "tell_idle",
    "to_number",
    "unpack_plain",
    "update_codec",
]
