"""`fedpara plan`: the bytes and seconds of a run, predicted before it starts.

Bytes without a codec follow from shapes. Bytes with a codec are an estimate: a synthetic update is
encoded. The ledger measures the bytes of a run.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedpara_plugins.codecs import Codec, Description, HeaderForm, encode_payload, parse_codec
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.models.checkpoint_files import RESERVED_NAME, RESERVED_TEXT
from fedpara_plugins.models.conversion import convert
from fedpara_plugins.models.frozen import frozen_tensors, static_buffers
from fedpara_plugins.models.model_report import Report, report
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_split import split
from fedpara_plugins.support.units import readable_bytes, readable_seconds

__all__ = ["Link", "MessageSize", "TrafficPlan", "choose_gamma", "message_bytes", "plan_traffic"]

GAMMA_STEPS = 1000
"""gamma is chosen among multiples of 1/1000; a smaller step seldom changes a rank."""

UPDATE_SIZE = 0.01
"""Standard deviation of the synthetic update, as a share of that of each tensor."""

ESTIMATE = (
    "Coded bytes are an estimate: one synthetic update (normal values of 1 % of each tensor's "
    "spread) was really encoded, header included. The ledger of a run measures real ones."
)


@dataclass(frozen=True, kw_only=True)
class Link:
    """The speeds of a client's connection in bits per second; None if unknown."""

    up: float | None = None
    down: float | None = None


@dataclass(frozen=True)
class MessageSize:
    """One message in one direction: a description of what it carries, and its bytes."""

    label: str
    size: int


@dataclass(frozen=True, kw_only=True)
class TrafficPlan:
    """The result of `plan_traffic`; ``str(plan)`` is what the command prints.

    Attributes:
        config: the options, with the chosen gamma.
        report: has a row for each layer.
        messages: the alternatives: first the dense model without a codec, last the configured one.
        first_contact: bytes that each client receives once, before updates can be encoded; 0 if the
            codec needs no reference.
        link: speeds for which seconds are computed.
        clients: number of clients that take part in a round.
        rounds: number of rounds.
        frozen: bytes of frozen parameters, which are in no message but the first, of the dense
            model without a codec.
    """

    config: FedParaConfig
    report: Report
    messages: tuple[MessageSize, ...]
    first_contact: int
    link: Link
    clients: int
    rounds: int
    frozen: int = 0

    def __str__(self) -> str:
        parts = [str(self.report), "", *self._table()]
        if self.first_contact:
            parts.append(
                f"First contact, once per client and not in the table: "
                f"{readable_bytes(self.first_contact)} down."
            )
        if self.frozen and len(self.messages) > 1:
            parts.append(
                f"Frozen parameters ({readable_bytes(self.frozen)}) are sent with the plain dense "
                f'model alone, without method and codec; send = "all" sends them always.'
            )
        if self.config.codec != "none":
            parts.append(ESTIMATE)
        return "\n".join(parts)

    def _table(self) -> list[str]:
        dense = self.messages[0].size
        many = self.clients * self.rounds
        head = ["one message", "bytes", "fewer"]
        head += ["up / round"] if self.link.up else []
        head += ["down / round"] if self.link.down else []
        head += [f"{_count(self.rounds, 'round')}, {_count(self.clients, 'client')}"]
        rows = [head]
        for message in self.messages:
            fewer = dense / message.size if message.size else 1.0
            row = [message.label, readable_bytes(message.size), f"{fewer:.1f}x"]
            row += [readable_seconds(8 * message.size / v) for v in self._speeds()]
            rows.append([*row, f"{readable_bytes(2 * many * message.size)} up and down"])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            "  ".join(
                text.rjust(width) if place else text.ljust(width)
                for place, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]

    def _speeds(self) -> list[float]:
        return [speed for speed in (self.link.up, self.link.down) if speed]


def plan_traffic(
    model: nn.Module,
    config: FedParaConfig,
    *,
    link: Link | None = None,
    clients: int = 1,
    rounds: int = 1,
) -> TrafficPlan:
    """Predict what a run with this model and config sends.

    Args:
        model: the unconverted model; not modified.
        config: the options of the run.
        link: a client's connection.
        clients: number of clients that take part in a round.
        rounds: number of rounds.

    Raises:
        ConfigError: an option, or the number of clients or rounds, is out of range.
        ConversionError: the model cannot be converted.
        PayloadError: a tensor has a name that no message can hold.
    """
    for name, number in (("clients", clients), ("rounds", rounds)):
        if number < 1:
            raise ConfigError(f"{name}: expected at least 1, got {number}")
    codec = parse_codec(config.codec)
    if RESERVED_NAME in model.state_dict():
        raise PayloadError(RESERVED_TEXT)
    converted = _converted(model, config)
    found = report(converted)
    messages = [MessageSize("dense", found.dense_bytes)]
    if codec.stages and config.method != "none":
        messages.append(MessageSize(f"dense, {codec.name}", _coded_bytes(model, codec)))
    if config.method != "none":
        messages.append(MessageSize(config.method, _bytes(_sent(converted))))
    if codec.stages:
        coded = _coded_bytes(converted, codec)
        label = f"{config.method}, {codec.name}".replace("none,", "dense,")
        messages.append(MessageSize(label, coded))
    return TrafficPlan(
        config=config,
        report=found,
        messages=tuple(messages),
        first_contact=_first_contact(converted, codec) if codec.needs_reference else 0,
        link=link or Link(),
        clients=clients,
        rounds=rounds,
        frozen=_bytes(split(converted).shared) - _bytes(_sent(converted)),
    )


def choose_gamma(model: nn.Module, config: FedParaConfig, *, target: int) -> FedParaConfig:
    """Return the config with the largest gamma whose messages have at most ``target`` bytes.

    Messages grow with gamma, so bisection finds it among multiples of 0.001. Without a codec the
    tensors' bytes count; with one, the bytes of an encoded synthetic update.

    Args:
        model: the unconverted model; not modified.
        config: all other options; its gamma is ignored.
        target: bytes of one message.

    Raises:
        ConfigError: another rule for ranks is given, or no gamma meets the target; the message
            names the smallest possible size.
        ConversionError: the model cannot be converted.
    """
    if config.ratio is not None or config.rank is not None or config.method == "none":
        raise ConfigError(
            "a target size chooses gamma: give a method, and neither ratio nor rank, with it"
        )
    smallest = message_bytes(model, replace(config, gamma=0.0))
    if smallest > target:
        raise ConfigError(
            f"a message of {target:,} bytes is not possible: the smallest, with gamma 0, has "
            f"{smallest:,} bytes ({config.method}, codec {config.codec}). Raise the target, choose "
            f"a stronger codec, or give smaller ranks with rank or overrides."
        )
    fits, exceeds = 0, GAMMA_STEPS + 1
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if message_bytes(model, replace(config, gamma=middle / GAMMA_STEPS)) <= target:
            fits = middle
        else:
            exceeds = middle
    return replace(config, gamma=fits / GAMMA_STEPS)


def message_bytes(model: nn.Module, config: FedParaConfig) -> int:
    """Return the bytes of one message: of an encoded update, or of the tensors without a codec."""
    codec = parse_codec(config.codec)
    converted = _converted(model, config)
    return _coded_bytes(converted, codec) if codec.stages else _bytes(_sent(converted))


def _converted(model: nn.Module, config: FedParaConfig) -> nn.Module:
    # Bytes do not depend on the weights' values, so fresh factors will do.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return convert(copy.deepcopy(model), config.without_values())


def _coded_bytes(model: nn.Module, codec: Codec) -> int:
    reference = _sent(model)
    update = _updated(reference)
    spec = ModelSpec.of(model).to_json()
    form = HeaderForm(Description.of(spec, reference))
    return len(encode_payload(update, codec=codec, reference=reference, model=spec, form=form))


def _first_contact(model: nn.Module, codec: Codec) -> int:
    spec = ModelSpec.of(model).to_json()
    return len(encode_payload(_sent(model), codec=codec.first_contact(), model=spec))


def _sent(model: nn.Module) -> dict[str, Tensor]:
    """Return what travels where a method or a codec is on: all that is neither private nor frozen.

    If that is nothing, all that is not private is sent.
    """
    shared, frozen = split(model).shared, {**frozen_tensors(model), **static_buffers(model)}
    return {name: value for name, value in shared.items() if name not in frozen} or shared


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


def _updated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state after a synthetic training round; integers stay unchanged."""
    generator = torch.Generator().manual_seed(0)
    updated = {}
    for name, value in state.items():
        value = value.detach().cpu()
        if value.is_floating_point() and value.numel():
            # Sums are computed in a dtype that torch can add in; infinities of a mask stay.
            wide = value.double() if value.dtype == torch.float64 else value.float()
            finite = torch.isfinite(wide)
            spread = float(wide[finite].std(unbiased=False)) if finite.any() else 0.0
            noise = torch.randn(value.shape, generator=generator)
            moved = wide + UPDATE_SIZE * (spread or 1.0) * noise
            value = torch.where(finite, moved, wide).to(value.dtype)
        updated[name] = value
    return updated


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
