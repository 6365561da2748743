"""Joint payloads: the records of a message as one, and what strangers may send."""

from __future__ import annotations

import base64
import contextlib
import json
import random
import struct
import tracemalloc
import zlib

import pytest
import torch

from fedpara_plugins.codecs import (
    Description,
    HeaderForm,
    LostDescriptionError,
    Roll,
    RollRow,
    decode_payload,
    encode_payload,
    join_payloads,
    parse_codec,
    reference_hash,
    separate_payloads,
)
from fedpara_plugins.codecs.compact import checked_parts, joined_parts
from fedpara_plugins.codecs.header_packing import deflate_text, inflate_text
from fedpara_plugins.codecs.payload import open_payload
from fedpara_plugins.codecs.roll import NO_ROLL
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.handed_over import working_limit
from fedpara_plugins.testing.samples import same_bits

EXTRA = {"decoders": ["zlib", "ans", "zstd", "payload2", "payload3"]}
MODEL = {"weights": [], "seed": 0, "fingerprint": "ab"}
LIMIT = 10**7
NUMBERS = ("steps", "scales")


def lora(count, seed=0, tensors=8):
    """Parts of an adapter, each with shapes of its own."""
    draw = torch.Generator().manual_seed(seed)
    return {
        f"part{n}": {
            f"layers.{i}.lora_{'AB'[i % 2]}.weight": torch.randn(8 + n, 32, generator=draw)
            for i in range(tensors + n)
        }
        for n in range(count)
    }


class Sides:
    """References, descriptions and the roll that both sides hold after a first message."""

    def __init__(self, records):
        self.held = records
        self.known = {name: Description.of(MODEL, state) for name, state in records.items()}
        self.roll = Roll(
            tuple(
                RollRow(n, self.known[n].digest, reference_hash(s), len(s))
                for n, s in records.items()
            )
        )

    def payloads(self, codec, seed=1, described=True):
        draw = torch.Generator().manual_seed(seed)
        return {
            name: encode_payload(
                {k: v + 0.01 * torch.randn(v.shape, generator=draw) for k, v in state.items()},
                codec=parse_codec(codec), reference=state, model=MODEL, extra=EXTRA,
                form=HeaderForm(self.known[name] if described else None),
            )
            for name, state in self.held.items()
        }  # fmt: skip

    @property
    def counts(self):
        return {name: len(state) for name, state in self.held.items()}

    def joined(self, payloads, roll=None):
        return join_payloads(payloads, roll=roll or Roll(()), tensors=self.counts)

    def separated(self, data, **options):
        return separate_payloads(data, rolls={self.roll.digest: self.roll}, **options)

    def decoded(self, payloads):
        return {
            name: decode_payload(
                payload, reference=self.held.get(name), limit=LIMIT,
                descriptions={d.digest: d for d in self.known.values()},
            )
            for name, payload in payloads.items()
        }  # fmt: skip

    def values(self, payloads):
        """Bytes of each payload's stream and steps."""
        known = {d.digest: d for d in self.known.values()}
        for payload in payloads.values():
            opened = open_payload(payload, limit=LIMIT, descriptions=known)
            texts = [note.get(key, "") for note in opened.header.notes for key in NUMBERS]
            yield opened.container.body.nbytes + sum(len(base64.b64decode(t)) for t in texts)


CODECS = ["none", "lossless", "int8", "balanced", "small", "delta+quantise+ans", "grid+ans"]


@pytest.mark.parametrize("rolled", [True, False])
@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("codec", CODECS)
def test_the_records_come_back_as_they_were(codec, described, rolled):
    sides = Sides(lora(3))
    payloads = sides.payloads(codec, described=described)
    data = sides.joined(payloads, sides.roll if rolled else None)
    found = sides.separated(data)
    assert list(found) == list(payloads)
    before, after = sides.decoded(payloads), sides.decoded(found)
    for name in payloads:
        assert same_bits(before[name].tensors, after[name].tensors)
        assert before[name].header == after[name].header
    assert not rolled or len(data) < sum(map(len, payloads.values()))


@pytest.mark.parametrize("codec", ["lossless", "int8", "balanced", "small", "delta+quantise+ans"])
@pytest.mark.parametrize("records", [2, 5])
def test_a_further_record_takes_16_bytes(codec, records):
    sides = Sides(lora(records))
    payloads = sides.payloads(codec)
    data = sides.joined(payloads, sides.roll)
    beside = len(data) - sum(sides.values(payloads))
    assert beside <= 119 + 16 * (records - 1)


# --- hostile ------------------------------------------------------------------------------------


def forged(text, raw=b"", body=b"", digest=NO_ROLL):
    return joined_parts(deflate_text(text, raw), digest, [body], magic=b"FPP3")


HEAD = json.dumps(["a", "0" * 32, 2])


def refused(data, words, **options):
    with pytest.raises(PayloadError, match=words):
        separate_payloads(data, rolls={}, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\n{}", "in an invalid way"),  # no roll, so no row
        ('["a",0]\n{}', "in an invalid way"),
        ('["a",true]\n{}', "in an invalid way"),
        ('["a","00",2]\n{}', "in an invalid way"),
        (f'["a","{"0" * 32}",65537]\n{{}}', "in an invalid way"),
        (f'["a","{"0" * 32}",-1]\n{{}}', "in an invalid way"),
        (f'["a","{"0" * 32}",2.0]\n{{}}', "in an invalid way"),
        (f'[["a"],"{"0" * 32}",2]\n{{}}', "in an invalid way"),
        (f'["{"a" * 257}","{"0" * 32}",2]\n{{}}', "in an invalid way"),
        (f'["\\ud800","{"0" * 32}",2]\n{{}}', "in an invalid way"),
        ("[" + "a" * 5000 + "\n{}", "in an invalid way"),
        ("{}\n{}", "in an invalid way"),
        (HEAD, "a line is missing"),
        ("\n".join([HEAD, "{}"] * 65), "more than the 64 records"),
        (HEAD + "\n{\x0e}", "that its roll lacks"),
        (HEAD + "\n{\x07}", "are missing"),
        (HEAD + "\n{\x11}", "are missing"),
        (HEAD + "\n" + "0\x10" * 129, "more than 128 marks"),
        (HEAD + "\n" + "\x07\x10" * 65, "refers to more than 128"),
        (HEAD + "\n" + "\x07" * 129, "refers to more than 128"),
    ],
)
def test_what_does_not_follow_the_page_is_refused(text, words):
    refused(forged(text), words)


def test_runs_are_counted_before_they_are_written():
    text = json.dumps(["a", "0" * 32, 65536]) + "\n" + "0\x10" * 100
    tracemalloc.start()
    refused(forged(text), "would have more than")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    both = json.dumps(["a", "0" * 32, 65536]) + "\n" + "0\x10" * 40
    refused(forged("\n".join([both, both.replace('"a"', '"b"')]), b"\0"), "would have more than")


def test_a_limit_bounds_the_headers_too():
    text = HEAD + "\n" + " " * 2**21
    separate_payloads(forged(text), rolls={})
    refused(forged(" " * 2**23), "longer than")
    small = forged(HEAD + "\n" + " " * (working_limit(0) // 4))
    refused(small, "longer than", limit=0)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "sizes are damaged"),
        (b"\x80" * 5, "sizes are damaged"),
        (b"\x80" * 6 + b"\0", "sizes are damaged"),
        (b"\x05", "would have 5 bytes of 4"),
        (b"\xff\xff\xff\xff\x7f", "bytes of 4"),
        (b"\x04rest", "no record refers to"),
    ],
)
def test_sizes_and_raw_bytes(raw, words):
    text = "\n".join([HEAD, "{}", HEAD.replace('"a"', '"b"'), "{}"])
    refused(forged(text, raw, b"1234"), words)
    found = separate_payloads(forged(text, b"\x03", b"1234"), rolls={})
    assert {name: payload[-len(part) :] for (name, payload), part in zip(
        found.items(), (b"123", b"4"), strict=True
    )} == {"a": b"123", "b": b"4"}  # fmt: skip


def test_a_name_may_not_stand_twice():
    refused(forged("\n".join([HEAD, "{}", HEAD, "{}"]), b"\0"), "'a' twice")


def test_an_unknown_roll_is_named():
    sides = Sides(lora(2))
    data = sides.joined(sides.payloads("small"), sides.roll)
    with pytest.raises(LostDescriptionError, match=sides.roll.digest):
        separate_payloads(data, rolls={})


@pytest.mark.parametrize("data", [b"", b"FPP3", b"FPP2" + bytes(40), b"FPP3" + bytes(40)])
def test_what_is_no_joint_payload(data):
    refused(data, "not a (joint )?payload|damaged")


@pytest.mark.parametrize("codec", ["small", "lossless"])
def test_damage_raises_nothing_but_payload_errors(codec):
    sides = Sides(lora(3))
    whole = sides.joined(sides.payloads(codec), sides.roll)
    draw = random.Random(0)
    passed = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            data[draw.randrange(8, min(len(data), 400))] = draw.randrange(256)
        data[4:8] = struct.pack("<I", zlib.crc32(data[8:]))
        try:
            sides.decoded(sides.separated(bytes(data), limit=LIMIT))
            passed += 1
        except PayloadError:
            pass
    assert passed < 600


def test_a_damaged_text_raises_nothing_but_payload_errors():
    sides = Sides(lora(3))
    whole = sides.joined(sides.payloads("small"), sides.roll)
    packed, body, digest = checked_parts(whole, None)
    text, raw = inflate_text(packed, most=10**6)
    body = bytes(body)
    draw = random.Random(1)
    for _ in range(600):
        letters = list(text)
        for _ in range(draw.randint(1, 4)):
            letters[draw.randrange(len(letters))] = chr(draw.choice([*range(1, 20), *b'[]{}",0a']))
        data = forged("".join(letters), raw, body, digest)
        with contextlib.suppress(PayloadError):
            sides.decoded(sides.separated(data, limit=LIMIT))
