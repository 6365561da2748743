"""Fuzz the gate for clients' replies; ``tox run -e fuzz-replies -- --runs 20000 --seconds 60``.

Bytes alone hardly get past a checksum, so replies are built from their structure: an honest one is
taken apart, its tensors, records and values are changed, and it is encoded and signed again. Some
are damaged as bytes, too. Each is read as a server reads it, in the manner of either adapter.
"""

from __future__ import annotations

import argparse
import logging
import random
import resource
import signal
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins import FedParaError, ModelSpec, PayloadError, convert
from fedpara_plugins.codecs import HeaderForm, encode_payload, parse_codec
from fedpara_plugins.exchange import (
    DownlinkEncoder,
    ExchangeSettings,
    ReplyReader,
    check_figures,
    check_hashes,
    examples_of,
    zero_private_factors,
)
from fedpara_plugins.testing import check_refusal
from fedpara_plugins.testing import damaged as damaged_bytes
from fedpara_plugins_fedml.messages.envelope import pack, unpack
from fedpara_plugins_fedml.messages.head import Head
from fedpara_plugins_fedml.messages.hostile import damaged as damaged_message

SECONDS_A_REPLY = 10
GROWTH = 96 << 20
REPORT_EVERY = 10_000
MODEL, CHANGE = "model", "change"
CODECS = ("none", "lossless", "int8", "small", "delta+quantise:bits=4+zlib")
State = dict[str, Tensor]

INF, NAN = float("inf"), float("nan")
NUMBERS = (0.0, -0.0, 1.0, -1.0, NAN, INF, -INF, 1e30, -1e38, 3e38, 1e-45, 1e20, 65504.0)
WORDS: tuple[Any, ...] = (
    *(0, 1, -1, 2**31, 2**53, 2**53 + 1, 2**63, -(2**63), 10**99, True, False, None),
    *(0.5, 1e300, -1e-300, "", "x", "model", "../x", "ab" * 32, "AB" * 32, "\x00\n", [], [1], {}),
    *({"model": 3}, ["zlib"], ["z" * 99], {"model": ["ab" * 32]}, "évaluer"),
)


class GateError(AssertionError):
    """The gate let something pass that it must not."""


class TooSlow(BaseException):
    """A reply took too long; no Exception, so that no handler hides it."""


class Gate:
    """A server's reading end, as both adapters have it.

    Args:
        mask: whether the model has a buffer with infinite values, which lossy codecs cannot carry.
    """

    def __init__(self, *, mask: bool) -> None:
        self.mask = mask
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 4).half(), nn.BatchNorm1d(4))
        if mask:
            layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 2, bias=False))
            layers.register_buffer("mask", torch.tensor([0.0, -INF, INF]))
        private = [] if mask else ["0.bias"]
        net = convert(layers, method="pfedpara", min_size=1, gamma=0.2, private=private)
        zero_private_factors(net)
        self.spec = ModelSpec.of(net)
        self.state = {k: v.detach().clone() for k, v in net.state_dict().items()}
        self.shared = {k: self.state[k] for k in self.spec.shared_keys}
        options = {"method": "pfedpara", "gamma": 0.2, "min_size": 1}
        self.sent = DownlinkEncoder(ExchangeSettings(**ExchangeSettings.read(options)))
        self.sent.put(MODEL, self.state, self.spec)
        self.sent.encode("7", MODEL)
        self.parameters = [n for n in dict(net.named_parameters()) if n in self.shared]

    def reader(self, *, strict: bool) -> ReplyReader:
        """Return what reads one reply: as FedML's adapter does, or as Flower's."""
        return ReplyReader(
            self.sent,
            kind_of=lambda name: "model" if name == MODEL or not strict else "side",
            model_of=lambda tensors: self.spec,
            strict=strict,
            asked={CHANGE} if strict else (),
            own=not strict,
        )

    def read(self, data: bytes) -> None:
        """Read a reply as a server does.

        Raises:
            FedParaError: it is left out.
            GateError: it passed, and must not.
        """
        strict = bool(zlib.crc32(data) & 1)
        found = unpack(data)
        head = Head.from_json(found.head)
        head.raise_error("7")
        check_hashes(head.holds, head.has, head.decoders, records=1)
        examples = examples_of(head.examples)
        check_figures("metrics", head.metrics)
        reader = self.reader(strict=strict)
        read = reader.read_all(found.payloads)
        reader.received(MODEL, head.holds.get(MODEL, ""))
        self.check(read, examples, strict=strict)

    def check(self, read: Mapping[str, Any], examples: float, *, strict: bool) -> None:
        """Compare what passed with the rules, computed here in the plainest way."""
        if not 0 < examples <= 2**53 or isinstance(examples, bool):
            raise GateError(f"{examples} examples passed")
        bytes_passed = 0
        for name, record in read.items():
            bytes_passed += sum(value.nbytes for value in record.shared.values())
            private = self.spec.private_keys & record.shared.keys()
            if private:
                raise GateError(f"private {sorted(private)} passed in {name!r}")
            if name == MODEL:
                self._check_model(record, strict=strict)
            elif strict and not record.shared.keys() <= self.shared.keys():
                raise GateError(f"names beside the model passed in {name!r}")
            for key, value in record.shared.items() if name != MODEL else ():
                if not _finite(value):
                    raise GateError(f"{key!r} of {name!r} is not finite")
                if strict and value.shape != self.shared[key].shape:
                    raise GateError(f"{key!r} of {name!r} has another shape")
        own = sum(value.nbytes for value in self.state.values())
        if bytes_passed > 2 * own + (4 << 20):
            raise GateError(f"{bytes_passed} bytes passed, and the model has {own}")

    def _check_model(self, record: Any, *, strict: bool) -> None:
        if not record.shared or not record.shared.keys() <= self.shared.keys():
            raise GateError("a model of other names passed")
        if strict and record.shared.keys() != self.shared.keys():
            raise GateError("a part of a model passed")
        for key, value in record.shared.items():
            _check_tensor(key, value, self.state[key])
        if record.shared.keys() == self.shared.keys():
            self._check_whole(record)

    def _check_whole(self, record: Any) -> None:
        if tuple(record.state) != self.spec.keys:
            raise GateError("a whole model is not completed")
        dense = self.spec.dense_state(record.shared)
        for weight in self.spec.weights:
            if not torch.isfinite(dense[weight]).all():
                raise GateError(f"the composed {weight!r} is not finite")


def _check_tensor(key: str, value: Tensor, sent: Tensor) -> None:
    if value.shape != sent.shape or value.dtype != sent.dtype:
        raise GateError(f"{key!r} of {value.dtype} {tuple(value.shape)} passed")
    if value.is_floating_point():
        wide, old = value.double(), sent.double()
        if not (wide.isfinite() | (wide == old)).all():
            raise GateError(f"{key!r} is not finite where it was")


def _finite(value: Tensor) -> bool:
    if value.is_complex():
        value = torch.view_as_real(value)
    return not value.is_floating_point() or bool(torch.isfinite(value.double()).all())


# Replies


@dataclass
class Draft:
    """A reply that is being made.

    Attributes:
        head: plain values.
        payloads: the bytes of each record.
        states: by record, the tensors that are encoded in the place of its bytes.
        codecs: by such a record, the codec.
    """

    head: dict[str, Any]
    payloads: dict[str, bytes]
    states: dict[str, State] = field(default_factory=dict)
    codecs: dict[str, str] = field(default_factory=dict)

    def packed(self) -> bytes:
        """Return the message."""
        for name, state in self.states.items():
            if name in self.payloads:
                codec = parse_codec(self.codecs.get(name, "none"))
                with suppress(FedParaError, RuntimeError):  # what cannot be encoded stays
                    self.payloads[name] = encode_payload(state, codec=codec)
        return pack(self.head, self.payloads)


class Replies:
    """Makes replies from draws.

    Args:
        gate: whose honest replies they start from.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        codecs = CODECS[:2] if gate.mask else CODECS
        self._drafts = [self._honest(codec, change) for codec in codecs for change in (0, 1)]
        self.corpus = [draft.packed() for draft in self._drafts]
        part = {name: 0.1 * gate.shared[name] for name in gate.parameters}
        self._states = {MODEL: gate.shared, CHANGE: part}

    def _honest(self, codec: str, change: int) -> Draft:
        head = Head(
            round=1,
            examples=20.0,
            holds={MODEL: "ab" * 32},
            decoders=["zlib", "ans"],
            report={"since": 0, "kept": 1.0},
            metrics={"loss": 2.0},
        )
        payloads = {MODEL: self._encoded(self.gate.shared, codec)}
        if change:
            part = {name: 0.1 * self.gate.shared[name] for name in self.gate.parameters}
            payloads[CHANGE] = self._encoded(part, "none")
        return Draft(head.to_json(), payloads)

    def _encoded(self, state: State, codec: str) -> bytes:
        described = self.gate.spec.to_json()
        known = next(iter(self.gate.sent.descriptions.values()))
        forms = (None, HeaderForm(known), HeaderForm())
        return encode_payload(
            state,
            codec=parse_codec(codec),
            model=described,
            extra={"decoders": ["zlib"]},
            form=forms[len(codec) % len(forms)],
        )

    def draw(self, draw: random.Random) -> bytes:
        """Return a reply, changed in up to four places."""
        honest = draw.choice(self._drafts)
        draft = Draft(dict(honest.head), dict(honest.payloads))
        for _ in range(draw.choice((0, 1, 1, 1, 2, 2, 3, 4))):
            self._change(draft, draw)
        try:
            data = draft.packed()
        except PayloadError:  # a name or a value that no message can have
            data = draw.choice(self.corpus)
        return damaged_message(data, draw) if draw.random() < 0.1 else data

    def _change(self, draft: Draft, draw: random.Random) -> None:
        kind = draw.random()
        if kind < 0.12:
            _change_head(draft.head, draw)
        elif kind < 0.2 or not draft.payloads:
            _change_records(draft.payloads, draw)
        else:
            name = draw.choice(list(draft.payloads))
            if draw.random() < 0.15:
                draft.payloads[name] = damaged_bytes(draft.payloads[name], draw)
                draft.states.pop(name, None)
            else:
                state = dict(draft.states.get(name) or self._states.get(name) or {})
                draft.states[name] = _changed_state(state, self.gate, draw)
                draft.codecs[name] = draw.choice(CODECS) if draw.random() < 0.3 else "none"


def _change_head(head: dict[str, Any], draw: random.Random) -> None:
    names = [*Head.__dataclass_fields__, "strange"]
    name = draw.choice(names)
    kind = draw.random()
    if kind < 0.2:
        head.pop(name, None)
    elif kind < 0.4 and isinstance(head.get(name), dict):
        head[name] = {
            **head[name],
            draw.choice(["model", "change", "kept", "x"]): draw.choice(WORDS),
        }
    elif kind < 0.5 and isinstance(head.get(name), dict):
        head[name] = {f"r{n}": draw.choice(WORDS) for n in range(draw.choice((3, 2000)))}
    else:
        head[name] = draw.choice(WORDS)


def _change_records(payloads: dict[str, bytes], draw: random.Random) -> None:
    names = list(payloads) or [MODEL]
    some = payloads.get(draw.choice(names), b"")
    kind = draw.randrange(5)
    if kind == 0:
        payloads.pop(draw.choice(names), None)
    elif kind == 1:
        payloads[draw.choice((MODEL, CHANGE, "variate", "own", "other"))] = some
    elif kind == 2:
        payloads.update({f"r{n}": some for n in range(draw.choice((2, 5, 60)))})
    elif kind == 3:
        payloads[draw.choice(names)] = draw.randbytes(draw.choice((0, 1, 8, 200)))
    else:
        payloads.update(dict(zip(names, reversed(list(payloads.values())), strict=False)))


def _changed_state(state: State, gate: Gate, draw: random.Random) -> State:
    names = list(state)
    if not names:
        return {draw.choice(list(gate.state)): torch.zeros(draw.randrange(4))}
    name = draw.choice(names)
    kind = draw.random()
    if kind < 0.55:
        change = draw.choice(CHANGES)
        state[name] = change(state[name], draw)
    elif kind < 0.65:
        del state[name]
    elif kind < 0.75:
        state[draw.choice([*gate.state, "new", "", "é", "a" * 300])] = state[name]
    elif kind < 0.8:
        state[name + draw.choice(("x", ".weight", "'"))] = state.pop(name)
    elif kind < 0.9:
        factor = draw.choice((1e10, 1e19, 1e25, 1e37, NAN, INF, 0.0))
        for key in names:
            if state[key].is_floating_point():
                state[key] = (state[key].double() * factor).to(state[key].dtype)
    elif kind < 0.93:
        state.update({f"t{n}": torch.zeros(1) for n in range(draw.choice((3, 400)))})
    else:
        items = list(state.items())
        draw.shuffle(items)
        state = dict(items)
    return state


DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.int8, torch.uint8, torch.uint64),
    *(torch.uint16, torch.int32),
)


def _cast(value: Tensor, draw: random.Random) -> Tensor:
    wide = value.to(torch.complex64) if value.is_complex() else value.double()
    return wide.real.to(draw.choice(DTYPES)) if wide.is_complex() else wide.to(draw.choice(DTYPES))


def _one_value(value: Tensor, draw: random.Random) -> Tensor:
    if not value.numel() or not value.is_floating_point() or value.element_size() == 1:
        return value
    flat = value.clone().reshape(-1)
    number = torch.tensor(draw.choice(NUMBERS), dtype=torch.float64).to(value.dtype)
    flat[draw.randrange(flat.numel())] = number
    return flat.reshape(value.shape)


def _all_values(value: Tensor, draw: random.Random) -> Tensor:
    number = torch.tensor(draw.choice(NUMBERS), dtype=torch.float64)
    if draw.random() < 0.3:
        return number.expand(value.shape).clone()
    real = value.is_floating_point() and value.element_size() > 1
    return number.to(value.dtype).expand(value.shape).clone() if real else value


def _shape(value: Tensor, draw: random.Random) -> Tensor:
    kind = draw.randrange(5)
    if kind == 0:
        return value.reshape(-1)
    if kind == 1:
        return value[None]
    if kind == 2:
        return value.reshape(-1)[: draw.randrange(value.numel() + 1)]
    if kind == 3:
        return value.transpose(0, -1).contiguous() if value.dim() > 1 else value[None]
    return torch.zeros(draw.choice(((0,), (), (3,), (2, 0, 3), (1,) * 20, (70_000,))))


CHANGES: tuple[Callable[[Tensor, random.Random], Tensor], ...] = (
    _cast,
    _one_value,
    _one_value,
    _all_values,
    _shape,
)


# The run


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, and return 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=200_000, help="replies to try")
    parser.add_argument("--seconds", type=int, default=3600, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    logging.disable()
    gates = [Gate(mask=False), Gate(mask=False), Gate(mask=True)]
    sources, draw = [Replies(gate) for gate in gates], random.Random(options.seed)
    reasons: Counter[str] = Counter()
    for replies in sources:  # first, so that lazy imports do not count as growth
        for data in replies.corpus:
            _try(replies.gate, data, reasons)
    if reasons:
        raise SystemExit(f"honest replies are left out: {reasons}")
    signal.signal(signal.SIGALRM, _too_slow)
    before, start, tried, found = _peak(), time.monotonic(), 0, 0
    passed = 0
    while tried < options.runs and time.monotonic() < start + options.seconds:
        replies = draw.choice(sources)
        data = replies.draw(draw)
        tried += 1
        signal.setitimer(signal.ITIMER_REAL, SECONDS_A_REPLY)
        try:
            passed += _try(replies.gate, data, reasons)
        except (Exception, TooSlow) as error:
            found += 1
            print(f"reply {tried}, crc {zlib.crc32(data):08x}: {type(error).__name__}: {error}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if tried % REPORT_EVERY == 0:
            print(f"{tried} replies, {passed} passed, {found} escapes", flush=True)
    grown, seconds = _peak() - before, time.monotonic() - start
    print(
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, seed {options.seed}: {tried} "
        f"replies in {seconds:.0f} s ({tried / seconds:.0f} a second), {passed} passed, "
        f"{tried - passed - found} left out, {found} escapes; memory grew by "
        f"{grown / 2**20:.1f} MiB"
    )
    for reason, count in reasons.most_common(25):
        print(f"{count:8d}  {reason}")
    if grown > GROWTH:
        raise SystemExit(f"the process grew by {grown} bytes, more than {GROWTH}")
    return 1 if found else 0


def _try(gate: Gate, data: bytes, reasons: Counter[str]) -> bool:
    try:
        gate.read(data)
    except FedParaError as error:
        if isinstance(error, PayloadError):
            check_refusal(error)
        reasons[" ".join(str(error).split()[:5])] += 1
        return False
    return True


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _too_slow(signum: int, frame: FrameType | None) -> None:
    raise TooSlow(f"a reply took more than {SECONDS_A_REPLY} s")


if __name__ == "__main__":
    raise SystemExit(main())
