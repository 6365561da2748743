"""The steps that every adapter takes with a message, on either side, whatever the framework.

- On a client, `ClientRound` decodes a message, returns the tensors for the user's code, decides
  which tensors of the reply may leave the device (in `outgoing.py` alone, by `OwnModels`), encodes
  these, and keeps the others in `ClientState`.
- On a server, `DownlinkEncoder` encodes messages for each client, `ReplyReader` decodes, checks
  and completes replies, and `RunAccounting` counts both.

A record is a named group of tensors in a message: the model, or an optimizer's variates beside it.
Offers these classes, and what adapters need around them: options, dense rounds, sizes.
May import everything of the core but ``cli`` and ``testing``.
"""

from __future__ import annotations

from fedpara_plugins.exchange.accounting import RunAccounting
from fedpara_plugins.exchange.client_round import ClientRound
from fedpara_plugins.exchange.client_state import ClientState
from fedpara_plugins.exchange.conversion import convert_or_keep
from fedpara_plugins.exchange.dense_round import (
    DenseRound,
    converted_copy,
    log_idle_options,
    refuse_in_factor_space,
)
from fedpara_plugins.exchange.downlink_encoder import DownlinkEncoder
from fedpara_plugins.exchange.frozen import FROZEN, changed_record, frozen_record
from fedpara_plugins.exchange.frozen_source import LacksFrozenError
from fedpara_plugins.exchange.incoming import ReceivedRecord
from fedpara_plugins.exchange.outliers import Outliers
from fedpara_plugins.exchange.own_models import OwnModel, OwnModels, is_apart
from fedpara_plugins.exchange.plain_values import pack_plain, unpack_plain
from fedpara_plugins.exchange.private_options import has_private_half
from fedpara_plugins.exchange.record_models import RecordModels
from fedpara_plugins.exchange.records import RecordKind, cast, plain_spec
from fedpara_plugins.exchange.reply_figures import check_figures, check_hashes, examples_of
from fedpara_plugins.exchange.reply_reader import ReadRecord, ReplyReader, reason_of
from fedpara_plugins.exchange.rolls import JOINT_RECORD
from fedpara_plugins.exchange.run_checkpoints import (
    close_own_checkpoints,
    own_checkpoint,
    server_checkpoint,
)
from fedpara_plugins.exchange.server_model import server_state, zero_private_factors
from fedpara_plugins.exchange.settings import ExchangeSettings, codecs_in_words, to_number
from fedpara_plugins.exchange.sizes import Size

__all__ = [
    "FROZEN",
    "JOINT_RECORD",
    "ClientRound",
    "ClientState",
    "DenseRound",
    "DownlinkEncoder",
    "ExchangeSettings",
    "LacksFrozenError",
    "Outliers",
    "OwnModel",
    "OwnModels",
    "ReadRecord",
    "ReceivedRecord",
    "RecordKind",
    "RecordModels",
    "ReplyReader",
    "RunAccounting",
    "Size",
    "cast",
    "changed_record",
    "check_figures",
    "check_hashes",
    "close_own_checkpoints",
    "codecs_in_words",
    "convert_or_keep",
    "converted_copy",
    "examples_of",
    "frozen_record",
    "has_private_half",
    "is_apart",
    "log_idle_options",
    "own_checkpoint",
    "pack_plain",
    "plain_spec",
    "reason_of",
    "refuse_in_factor_space",
    "server_checkpoint",
    "server_state",
    "to_number",
    "unpack_plain",
    "zero_private_factors",
]
