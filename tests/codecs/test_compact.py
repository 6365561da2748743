"""Payloads of version 2: the values of version 1 in fewer bytes, and what strangers may send."""

from __future__ import annotations

import json
import random
import struct
import tracemalloc
import zlib

import pytest
import torch
from lora_states import lora_state
from torch import nn

from fedpara_plugins import ModelSpec, convert
from fedpara_plugins.codecs import (
    Description,
    HeaderForm,
    LostDescriptionError,
    decode_payload,
    encode_payload,
    parse_codec,
    peek_header,
    reference_hash,
)
from fedpara_plugins.codecs.header_packing import WORDS, pack_text, unpack_text
from fedpara_plugins.codecs.payload import open_payload
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.testing.samples import SAMPLE_NAMES, finite_sample, nearby, same_bits

LIMIT = 10**6
EXTRA = {"decoders": ["zlib", "ans", "zstd", "payload2"]}
MODEL = {"seed": 3, "weights": [["w", "fedpara", [4, 3], 2, [0.1, 1e-05, 2.0], 0.0]]}


def signed(data):
    """The same bytes with a right checksum."""
    return data[:4] + struct.pack("<I", zlib.crc32(data[8:])) + data[8:]


def deflated(text):
    pack = zlib.compressobj(9, wbits=-15, zdict=WORDS)
    return pack.compress(text) + pack.flush()


def forged(packed, body=b"", digest=bytes(16)):
    return signed(b"FPP2" + bytes(4) + struct.pack("<I", len(packed)) + digest + packed + body)


FIELDS = {
    "plugin": "x", "codec": "none", "reference": None, "model": None, "extra": None, "notes": [],
    "names": ["a"], "shapes": [[2]], "dtypes": ["F32"], "each": "0",
}  # fmt: skip


def made(body=bytes(8), **changes):
    fields = {**FIELDS, **changes}
    fields = {name: value for name, value in fields.items() if value is not ...}
    return forged(deflated(json.dumps(fields).encode()), body)


def refused(data, words, *, limit=LIMIT, descriptions=None):
    with pytest.raises(PayloadError, match=words):
        decode_payload(data, limit=limit, descriptions=descriptions)


# --- the same values --------------------------------------------------------------------------


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("name", SAMPLE_NAMES)
@pytest.mark.parametrize("codec", ["none", "lossless", "int8", "balanced", "small", "grid+ans"])
def test_version_2_decodes_to_what_version_1_does(codec, name, described):
    tensors = finite_sample(name)
    reference = nearby(tensors)
    known = Description.of(MODEL, reference)
    given = {"codec": parse_codec(codec), "reference": reference, "model": MODEL, "extra": EXTRA}
    old = encode_payload(tensors, **given)
    new = encode_payload(tensors, **given, form=HeaderForm(known if described else None))
    held = {known.digest: known}
    back = decode_payload(new, reference=reference, limit=LIMIT, descriptions=held)
    was = decode_payload(old, reference=reference, limit=LIMIT)
    assert same_bits(back.tensors, was.tensors)
    assert list(back.tensors) == list(was.tensors)
    assert (back.header.model, back.header.extra) == (MODEL, EXTRA)
    assert (back.header.codec, back.header.reference) == (was.header.codec, was.header.reference)
    assert back.header.notes == was.header.notes
    assert peek_header(new, descriptions=held) == back.header
    assert len(new) < len(old)


def test_the_tensors_are_aligned_and_their_order_is_the_senders():
    tensors = {f"t{i}": torch.arange(3).to(dtype) for i, dtype in enumerate(
        (torch.uint8, torch.float64, torch.bfloat16, torch.complex64, torch.float32)
    )}  # fmt: skip
    data = encode_payload(tensors, codec=parse_codec("none"), form=HeaderForm())
    opened = open_payload(data, limit=LIMIT)
    assert (len(data) - opened.container.body.nbytes) % 8 == 0
    starts = {name: entry["data_offsets"][0] for name, entry in opened.container.table.items()}
    assert starts == {"t1": 0, "t3": 24, "t4": 48, "t2": 60, "t0": 66}
    back = opened.decode().tensors
    assert list(back) == list(tensors)
    assert same_bits(back, tensors)


# --- few bytes ----------------------------------------------------------------------------------


def vgg():
    sizes = (64, 64, 128, 128, 256, 256, 256, *[512] * 6)
    layers, before = [], 3
    for size in sizes:
        layers += [nn.Conv2d(before, size, 3), nn.GroupNorm(32, size)]
        before = size
    return nn.Sequential(*layers, nn.Linear(512, 512), nn.Linear(512, 10))


def batch_normed():
    blocks = (nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)) for _ in range(20))
    return nn.Sequential(*blocks)


def transformer():
    return nn.Sequential(*(nn.TransformerEncoderLayer(32, 4, 64) for _ in range(48)))


def described(model, **options):
    model = convert(model, **options) if options else model
    spec = ModelSpec.of(model)
    state = {k: v for k, v in model.state_dict().items() if k in spec.shared_keys}
    return state, spec.to_json()


def plain(state):
    return state, ModelSpec(weights={}, keys=tuple(state), seed=0).to_json()


CASES = {
    "vgg, fedpara": lambda: described(vgg(), method="fedpara", gamma=0.1),
    "vgg, pfedpara": lambda: described(vgg(), method="pfedpara", gamma=0.1),
    "vgg, dense": lambda: described(vgg()),
    "batch norm, fedpara": lambda: described(batch_normed(), method="fedpara", gamma=0.1),
    "batch norm, dense": lambda: described(batch_normed()),
    "48 layers, dense": lambda: described(transformer()),
    "lora of 12": lambda: plain(lora_state(12)),
    "lora of 80": lambda: plain(lora_state(80)),
    "lora of 12, bfloat16": lambda: plain({k: v.bfloat16() for k, v in lora_state(12).items()}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_later_payload_takes_119_bytes_beside_values_and_steps(case):
    """FedML's envelope adds 60 bytes to a message and 81 to a reply: 200 at most."""
    state, model = CASES[case]()
    known = Description.of(model, state)
    draw = torch.Generator().manual_seed(2)
    moved = {
        name: value + 0.01 * torch.randn(value.shape, generator=draw).to(value.dtype)
        if value.is_floating_point()
        else value + 1
        for name, value in state.items()
    }
    for codec in ("none", "lossless", "balanced", "small"):
        chain = parse_codec(codec).resolved(("zlib", "ans", "zstd"))
        for extra in (EXTRA, None):
            data = encode_payload(
                moved, codec=chain, reference=state, model=model, extra=extra,
                form=HeaderForm(known),
            )  # fmt: skip
            opened = open_payload(data, limit=10**9, descriptions={known.digest: known})
            steps = sum(4 * len(note.get("scopes", "")) for note in opened.header.notes)
            assert len(data) - opened.container.body.nbytes - steps <= 119, (codec, extra)


# --- strangers ----------------------------------------------------------------------------------


def test_the_helpers_above_forge_payloads_that_decode():
    assert decode_payload(made(), limit=LIMIT).tensors["a"].tolist() == [0, 0]


def test_a_description_that_is_not_held_is_named():
    known = Description.of(MODEL, finite_sample(SAMPLE_NAMES[0]))
    tensors = finite_sample(SAMPLE_NAMES[0])
    data = encode_payload(
        tensors, codec=parse_codec("zlib"), model=MODEL, extra=EXTRA, form=HeaderForm(known)
    )
    for held in (None, {}, {"f" * 32: known}):
        with pytest.raises(LostDescriptionError, match=known.digest):
            decode_payload(data, limit=LIMIT, descriptions=held)
    # A look at the header needs none, and says that something is missing.
    header = peek_header(data)
    assert (header.codec, header.model, header.description) == ("zlib", None, known.digest)
    assert header.extra == EXTRA
    with pytest.raises(LostDescriptionError):
        peek_header(data, descriptions={})


def test_another_description_under_the_same_hash_gives_no_other_tensors():
    """Nobody can make one, but a store may be damaged."""
    tensors = finite_sample(SAMPLE_NAMES[0])
    known = Description.of(MODEL, tensors)
    data = encode_payload(tensors, codec=parse_codec("zlib"), model=MODEL, form=HeaderForm(known))
    fewer = dict(list(tensors.items())[1:])
    for other in (Description(("", "", "", "")), Description.of(None, fewer)):
        with pytest.raises(PayloadError):
            decode_payload(data, limit=LIMIT, descriptions={known.digest: other})


def test_a_bomb_is_refused_before_it_takes_memory():
    zeros = zlib.compressobj(9, wbits=-15, zdict=WORDS)
    bomb = b"".join(zeros.compress(b" " * 2**20) for _ in range(200)) + zeros.flush()
    known = Description(("x" * 10**6, "", "", ""))
    held = {known.digest: known}
    pieces = forged(deflated(b"\x01" * 10**6), digest=bytes.fromhex(known.digest))
    lists = forged(deflated(b"[" + b"[]," * 600_000 + b"0]"))
    numbers = forged(deflated(b"\x05999999999\x06" * 64))
    for data, words in (
        (forged(bomb), "longer than the"),
        (pieces, "would have 1000000000000 characters"),
        (lists, "objects of the payload's header"),
        (numbers, "has 0 raw bytes, and refers to 63999999936"),
        (forged(deflated(b"\x07" * 2 * 10**6)), "raw bytes 2000000 times, at most 64"),
    ):
        tracemalloc.start()
        try:
            refused(data, words, limit=1000, descriptions=held)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 10 * 2**20, words


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"FPP2", "not a payload"),
        (b"FPP2" + bytes(24), "whose header would have 0"),
        (forged(b"\3" * 9)[:30], "whose header would have 9"),
        (forged(b"\7" * 9), "cannot be decompressed"),
        (forged(deflated(b"{}")[:-1]), "does not end with its compressed text"),
        (forged(deflated(b"{}") + bytes(8)), "does not end with its compressed text"),
        (forged(deflated(b"{}") + b"\0\1"), "does not end with its compressed text"),
        (forged(deflated('{"é":1}'.encode())), "not ASCII"),
        (forged(deflated(b"{}")), "table"),
        (forged(deflated(b"[]")), "not a JSON object"),
        (forged(deflated(b"\1")), "malformed JSON"),
        (forged(deflated(b"{}\0\1")), "has 1 raw bytes, and refers to 0"),
        (forged(deflated(b'{"\7"}\0\1')), "has 1 raw bytes, and refers to 32"),
        (forged(deflated(b'{"\0051\6"}')), "has 0 raw bytes, and refers to 1"),
        (made(body=bytes(9)), "9 bytes of tensors, the table has 8"),
        (made(body=bytes(7)), "7 bytes of tensors, the table has 8"),
        (made(body=bytes(2 * LIMIT)), "the container's body"),
        (made(names=["a", "b"]), "expected 2 shapes"),
        (made(names=["a", "a"], shapes=[[1], [1]], each="00"), "one is repeated"),
        (made(each="1"), "not in the table"),
        (made(each="-"), "has no dtype"),
        (made(each=...), "each"),
        (made(dtypes=["C128"], shapes=[[]], body=bytes(16)), "dtype 'C128'"),
        (made(shapes=[[2**60]]), "7 bytes|8 bytes"),
        (made(shapes=[[-2]]), "expected 1 shapes"),
        (made(dtypes=["BOOL"], shapes=[[8]], body=b"\2" * 8), "neither 0 nor 1"),
        (made(order=None), "header fields"),
        (made(crc32="0"), "header fields"),
        (made(plugin=...), "header fields"),
        (made(reference=1), "header fields"),
        (made(notes=[1]), "not a list of objects"),
        (made(notes=[{}]), "notes"),
        (made(codec="nothing"), "nothing"),
    ],
)  # fmt: skip
def test_whatever_does_not_follow_the_page_is_refused(data, words):
    refused(data, words)


def test_a_changed_bit_is_noticed_and_the_checksum_covers_all_behind_it():
    data = made()
    for place in range(4, len(data)):
        changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        refused(changed, "checksum|not a payload")


def test_damage_with_a_right_checksum_is_decoded_or_refused():
    tensors = finite_sample(SAMPLE_NAMES[0])
    reference = nearby(tensors)
    known = Description.of(MODEL, reference)
    held, draw = {known.digest: known}, random.Random(0)
    decoded = 0
    for codec in ("none", "int8", "small", "grid+ans"):
        data = encode_payload(
            tensors, codec=parse_codec(codec), reference=reference, model=MODEL,
            form=HeaderForm(known),
        )  # fmt: skip
        for _ in range(250):
            changed = bytearray(data)
            for _ in range(draw.choice((1, 1, 3))):
                changed[draw.randrange(8, len(changed))] = draw.randrange(256)
            cut = len(changed) if draw.random() < 0.8 else draw.randrange(8, len(changed))
            try:
                back = decode_payload(
                    signed(bytes(changed[:cut])), reference=reference, limit=LIMIT,
                    descriptions=held,
                )  # fmt: skip
            except PayloadError:
                continue
            decoded += 1
            assert sum(tensor.nbytes for tensor in back.tensors.values()) <= LIMIT
    assert decoded


def test_texts_come_back_whatever_stands_in_them():
    known = Description.of(MODEL, {"AAAABBBBCCCCDDDDEEEEFFFFabcd": torch.zeros(2)})
    digits = "0123456789abcdef" * 4
    many = [f"{i:064x}" for i in range(100)]
    for text in (
        "",
        json.dumps(many),
        json.dumps({"a": digits, "b": [digits, digits[:-1]], digits: 1}),
        json.dumps(
            ["QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVo=", "QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVp="]
        ),
        json.dumps({"n": ["AAAABBBBCCCCDDDDEEEEFFFFabcd"], "m": MODEL}),
        json.dumps("\x00\x01\x05\x07 é \U0001f600"),
    ):
        for description in (None, known):
            packed = memoryview(pack_text(text, description))
            assert unpack_text(packed, description, most=len(text) + 200) == text


def test_a_receiver_of_version_1_alone_says_what_it_expected():
    """An older release, which nobody sends version 2, would read an absurd length there."""
    assert struct.unpack("<Q", made()[:8])[0] > 4 * 2**20


def test_the_reference_is_checked_as_in_version_1():
    tensors = {"w": torch.ones(3)}
    data = encode_payload(tensors, codec=parse_codec("delta"), reference=tensors, form=HeaderForm())
    assert peek_header(data).reference == reference_hash(tensors)
    with pytest.raises(MismatchError, match="payload coded against reference"):
        decode_payload(data, limit=LIMIT)
