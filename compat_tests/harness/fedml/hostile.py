"""Hostile replies to a FedML server: what a client may send in the place of its own message."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedpara_plugins.codecs import encode_payload, parse_codec
from fedpara_plugins_fedml.messages.envelope import FIXED, pack, unpack
from harness.oracles.descriptions import decode_payload, separated

__all__ = ["ENVELOPES", "GRADIENTS", "STEPS", "VARIATES", "Attack", "tensors"]

Attack = Callable[[bytes], Any]
"""Maps an honest message to what is sent in its place."""
State = dict[str, Tensor]

INF, NAN = float("inf"), float("nan")
HASH = "ab" * 32


def head(**values: Any) -> Attack:
    """State other values in the head; None takes one out."""

    def attack(data: bytes) -> bytes:
        found = unpack(data)
        changed = {**found.head, **values}
        return pack({k: v for k, v in changed.items() if v is not None}, found.payloads)

    return attack


def raw_head(change: Callable[[bytes], bytes]) -> Attack:
    """Change the text of the head, and sign it again."""

    def attack(data: bytes) -> bytes:
        _, size, _ = FIXED.unpack_from(data)
        text = change(data[FIXED.size : FIXED.size + size])
        rest = data[FIXED.size + size :]
        return struct.pack("<4sII", b"FPE1", len(text), zlib.crc32(text)) + text + rest

    return attack


def report(**values: Any) -> Attack:
    """State other values in the report of an optimizer."""

    def attack(data: bytes) -> bytes:
        found = unpack(data)
        changed = {**found.head, "report": {**found.head.get("report", {}), **values}}
        return pack(changed, found.payloads)

    return attack


def records(change: Callable[[dict[str, bytes]], Mapping[str, bytes]]) -> Attack:
    """Send other payloads."""

    def attack(data: bytes) -> bytes:
        found = unpack(data)
        return pack(found.head, change(separated(found.payloads)))

    return attack


def tensors(change: Callable[[State], State], record: str = "model") -> Attack:
    """Encode other tensors in the place of the client's."""

    def changed(payloads: dict[str, bytes]) -> dict[str, bytes]:
        decoded = decode_payload(payloads[record], limit=2**30)
        payload = encode_payload(
            change(dict(decoded.tensors)),
            codec=parse_codec("none"),
            model=decoded.header.model,
            extra=decoded.header.extra,
        )
        return {**payloads, record: payload}

    return records(changed)


def one(change: Callable[[Tensor], Tensor], record: str = "model") -> Attack:
    """Change the first tensor."""

    def first(state: State) -> State:
        name = next(iter(state))
        return {**state, name: change(state[name])}

    return tensors(first, record)


def payload(state: State) -> bytes:
    return encode_payload(state, codec=parse_codec("none"))


def _huge_factors(state: State) -> State:
    return {
        name: torch.full_like(value, 1e25) if name.endswith(("x1", "y1")) else value
        for name, value in state.items()
    }


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def _renamed(state: State) -> State:
    first = next(iter(state))
    return {("renamed" if name == first else name): value for name, value in state.items()}


def _nested(text: bytes) -> bytes:
    return b'{"head":' + b"[" * 20_000 + b"]" * 20_000 + b',"payloads":[]}'


def _with_sizes(sizes: Any) -> Attack:
    def change(text: bytes) -> bytes:
        return json.dumps({**json.loads(text), "payloads": sizes}).encode()

    return raw_head(change)


ENVELOPES: Mapping[str, tuple[Attack, str]] = {
    "no bytes": (lambda d: {"weight": torch.ones(2)}, "got a dict"),
    "a number": (lambda d: 7, "got a int"),
    "nothing": (lambda d: None, "got a NoneType"),
    "no byte": (lambda d: b"", "incomplete"),
    "a pickle": (lambda d: pickle.dumps({"a": 1}), "begins with"),
    "half a message": (lambda d: d[: len(d) // 2], "truncated|damaged"),
    "a flipped bit": (lambda d: d[:-1] + bytes([d[-1] ^ 1]), "checksum"),
    "a nested head": (raw_head(_nested), "nested deeper"),
    "a head that is no text": (raw_head(lambda t: b"\xff\xfe" + t), "malformed"),
    "a payload of 8 TB": (_with_sizes([["model", 2**43]]), "size in its head"),
    "a negative size": (_with_sizes([["model", -1]]), "invalid way"),
    "another round": (head(round=99), "a reply of round 99"),
    "a round of text": (head(round="1"), "'round'"),
    "a flag as a round": (head(round=True), "'round'"),
    "another purpose": (head(purpose="evaluate"), "it answers to 'evaluate'"),
    "another purpose that the rule lacks": (head(purpose="prepare"), "it answers to 'prepare'"),
    "an unknown purpose": (head(purpose="x"), "purpose"),
    "no examples": (head(examples=None), "'examples'"),
    "zero examples": (head(examples=0), "'examples'"),
    "negative examples": (head(examples=-3), "'examples'"),
    "examples of text": (head(examples="9"), "'examples'"),
    "a flag as examples": (head(examples=True), "'examples'"),
    "huge examples": (head(examples=1e300), "'examples'"),
    "very huge examples": (head(examples=10**50), "'examples'"),
    "NaN examples": (raw_head(lambda t: t.replace(b'"examples":', b'"examples":NaN,"x":')), "NaN"),
    "an integer as a flag": (head(fresh=1), "'fresh'"),
    "lost, for ever": (head(lost=True), "lost the reference of the message, twice"),
    "lost, with a list of hashes": (head(lost=True, has={"model": ["../x"]}), "as a hash"),
    "hashes of a thousand records": (head(holds={f"r{n}": HASH for n in range(999)}), "records"),
    "a path as a hash": (head(holds={"model": "../../etc/passwd"}), "as a hash"),
    "an error of configuration": (head(error="misconfigured", fatal=True), "misconfigured"),
    "an error that is long": (head(error="x" * 9000 + "\n\x1b[31m"), "could not train"),
    "a report of other kinds": (head(report=[1]), "'report'"),
    "no records": (records(lambda p: {}), "no model"),
    "another record": (records(lambda p: {"other": p["model"]}), "unasked"),
    "a further record": (records(lambda p: {**p, "more": p["model"]}), "unasked"),
    "an unasked change": (records(lambda p: {**p, "change": p["model"]}), "unasked"),
    "60 records": (records(lambda p: {f"r{n}": p["model"] for n in range(60)}), "records"),
    "bfloat16 NaN": (one(lambda t: torch.full_like(t, NAN).bfloat16()), "NaN"),
    "float8": (one(lambda t: t.to(torch.float8_e4m3fn)), "float8"),
    "complex": (one(lambda t: t.to(torch.complex64)), "complex64"),
    "complex NaN": (one(lambda t: torch.full_like(t, NAN).to(torch.complex64)), "complex64"),
    "booleans": (one(lambda t: t > 0), "bool"),
    "float64 that float32 cannot hold": (one(lambda t: torch.full_like(t.double(), 1e300)), "inf"),
    "NaN": (one(_filled(NAN)), "NaN"),
    "infinity": (one(_filled(INF)), "infinite"),
    "factors that overflow": (tensors(_huge_factors), "compose"),
    "another shape": (one(lambda t: t[:-1]), "shape"),
    "a missing tensor": (tensors(lambda s: dict(list(s.items())[1:])), "other names"),
    "an extra tensor": (tensors(lambda s: {**s, "extra": torch.zeros(1)}), "other names"),
    "a private tensor": (tensors(lambda s: {**s, "0.x2": torch.zeros(64, 8)}), "private names"),
    "a renamed tensor": (tensors(_renamed), "other names"),
    "no tensors": (tensors(lambda s: {}), "other names"),
    "100 MB of zeros": (one(lambda t: torch.zeros(25 * 10**6)), "limit"),
}
"""Attacks on any reply to a training message, and what the line in the log says."""

VARIATES: Mapping[str, tuple[Attack, str]] = {
    "a change with NaN": (one(_filled(NAN), "change"), "NaN"),
    "a complex change": (one(lambda t: t + 0j, "change"), "complex64"),
    "a change of another shape": (one(lambda t: t[:-1], "change"), "shape"),
    "a change of other names": (tensors(lambda s: {"z": torch.ones(1)}, "change"), "shared name"),
    "a change of fewer names": (
        tensors(lambda s: dict(list(s.items())[1:]), "change"),
        "variate's names",
    ),
    "no change": (records(lambda p: {"model": p["model"]}), "variate's names"),
    "no report": (head(report={}), "lacks the report"),
    "a report that keeps twice": (report(kept=2.0), "lacks the report"),
    "a report of text": (report(kept="1"), "lacks the report"),
    "a report since before": (report(since=-4), "lacks the report"),
}
"""Attacks on SCAFFOLD."""

STEPS: Mapping[str, tuple[Attack, str]] = {
    "no steps": (report(steps=0), "report on its steps"),
    "a huge normaliser": (report(normaliser=1e300), "report on its steps"),
    "a tiny normaliser": (report(normaliser=1e-300), "report on its steps"),
    "huge steps": (report(steps=1e300), "report on its steps"),
    "a list of steps": (report(steps=[1]), "report on its steps"),
}
"""Attacks on FedNova."""

GRADIENTS: Mapping[str, tuple[Attack, str]] = {
    "a gradient with NaN": (one(_filled(NAN), "gradient"), "NaN"),
    "a gradient of another shape": (one(lambda t: t[:-1], "gradient"), "shape"),
    "a gradient of other names": (
        tensors(lambda s: {"z": torch.ones(1)}, "gradient"),
        "shared name",
    ),
    "a gradient of fewer names": (
        tensors(lambda s: dict(list(s.items())[1:]), "gradient"),
        "does not fit",
    ),
}
"""Attacks on MimeLite."""
