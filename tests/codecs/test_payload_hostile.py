"""Bytes from strangers: a PayloadError each time, never anything else, never memory beyond reason.

The checksum stops accidents. An attacker computes it too, so everything here is done twice: as it
is, and with the checksum made right again.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedpara_plugins.codecs import (
    BUILTIN_STAGES,
    decode_payload,
    encode_payload,
    parse_codec,
    peek_header,
)
from fedpara_plugins.codecs.json_reader import json_cost, strict_json
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.stages.stage import MAX_TENSORS

STAGES = {stage.name: stage for stage in BUILTIN_STAGES}
MARK = b'{\\"crc32\\":\\"'
LIMIT = 4096

TENSORS = {
    "b.weight": torch.linspace(-1, 1, 24).reshape(4, 6),
    "a.bias": torch.linspace(0, 1, 4).to(torch.bfloat16),
    "steps": torch.tensor(5),
    "mask": torch.tensor([True, False]),
}
REFERENCE = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
PAYLOADS = {
    name: encode_payload(
        TENSORS,
        codec=parse_codec(name, STAGES),
        reference=REFERENCE,
        model={"method": "fedpara", "rank": [1, 2]},
        extra={"round": 3},
    )
    for name in ("none", "lossless", "int8", "delta+int8")
}
every_payload = pytest.mark.parametrize("name", list(PAYLOADS))


def decode(data, *, limit=LIMIT):
    return decode_payload(data, reference=REFERENCE, limit=limit, stages=STAGES)


def refused(data, *, limit=LIMIT):
    with pytest.raises(PayloadError) as caught:
        decode(data, limit=limit)
    return str(caught.value)


def decoded_or_refused(data):
    """With a right checksum, damage may decode to other values; it never does anything else."""
    try:
        payload = decode(data)
    except PayloadError:
        return False
    assert sum(tensor.nbytes for tensor in payload.tensors.values()) <= LIMIT
    return True


def header_size(data):
    return 8 + struct.unpack("<Q", data[:8])[0]


def signed(data):
    """The same bytes with a right checksum, wherever there still is a place for one."""
    place = data.find(MARK) + len(MARK)
    if place < len(MARK) or len(data) < place + 8:
        return data
    digits = b"%08x" % zlib.crc32(data[:place] + b"00000000" + data[place + 8 :])
    return data[:place] + digits + data[place + 8 :]


def pack(header, body=b""):
    """A container with any safetensors header: an object, or the text itself."""
    text = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    return signed(struct.pack("<Q", len(text)) + text + body)


def parts(data):
    """The container's header, our header in it, and the body."""
    outer = json.loads(data[8 : header_size(data)])
    return outer, json.loads(outer["__metadata__"]["fedpara"]), data[header_size(data) :]


def forged(name, change=None, *, text=None):
    """A payload whose header was changed, or replaced by a text, and is signed again."""
    outer, inner, body = parts(PAYLOADS[name])
    if change is not None:
        change(inner)
    text = json.dumps(inner, separators=(",", ":")) if text is None else text
    outer["__metadata__"]["fedpara"] = text
    return pack(outer, body)


@every_payload
def test_the_helpers_above_forge_payloads_that_decode(name):
    assert list(decode(forged(name)).tensors) == list(TENSORS)


# --- damage -------------------------------------------------------------------------------------


@every_payload
def test_truncation_at_every_length(name):
    data = PAYLOADS[name]
    for length in range(len(data)):
        refused(data[:length])
        refused(signed(data[:length]))


@every_payload
def test_anything_after_the_end(name):
    for tail in (b"\x00", b" ", b"}", PAYLOADS[name]):
        refused(PAYLOADS[name] + tail)
        refused(signed(PAYLOADS[name] + tail))


@every_payload
def test_every_flipped_bit_is_noticed(name):
    data = PAYLOADS[name]
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        refused(bytes(flipped))


@every_payload
def test_flipped_bits_of_a_forger_are_refused_or_harmless(name):
    data = PAYLOADS[name]
    survivors = 0
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        survivors += decoded_or_refused(signed(bytes(flipped)))
    assert survivors < 8 * len(data) / 2


@every_payload
def test_random_damage_of_a_forger_is_refused_or_harmless(name):
    draw = random.Random(name)
    for _ in range(1500):
        data = bytearray(PAYLOADS[name])
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            kind = draw.randrange(4)
            if kind == 0:
                data[place] = draw.randrange(256)
            elif kind == 1:
                del data[place : place + draw.randint(1, 9)]
            elif kind == 2:
                data[place:place] = bytes(draw.choice(b'0123456789{}[]",:-e') for _ in range(3))
            else:
                other = draw.randrange(len(data))
                data[place:place] = data[other : other + draw.randint(1, 30)]
        whole = bytes(data)
        if draw.random() < 0.8:  # let most get past the container's length
            start = header_size(PAYLOADS[name]) + len(whole) - len(PAYLOADS[name])
            whole = struct.pack("<Q", max(0, start - 8)) + whole[8:]
        decoded_or_refused(signed(whole))


@given(data=st.binary(max_size=200))
@settings(max_examples=300)
def test_any_bytes(data):
    refused(data)
    refused(struct.pack("<Q", len(data)) + data)
    refused(pack(b'{"__metadata__":{"fedpara":"' + MARK + b'00000000\\"' + data))


strange_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["F32", "I8", "U8", "BOOL", "zlib", "delta", 2**62, 2**70, -1]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(name=st.sampled_from(list(PAYLOADS)), value=strange_json, data=st.data())
@settings(max_examples=500)
def test_header_fields_of_any_type_and_value(name, value, data):
    def change(header):
        target = header
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if target is header:
                keys.remove("crc32")
            key = data.draw(st.sampled_from(keys))
            deeper = isinstance(target[key], (dict, list)) and len(target[key]) > 0
            if not deeper or data.draw(st.booleans()):
                target[key] = value
                return
            target = target[key]

    decoded_or_refused(forged(name, change))


# --- things that are not payloads -----------------------------------------------------------------


def other_formats():
    saved = io.BytesIO()
    torch.save(TENSORS, saved)
    yield from (
        b"",
        b"\x00" * 8,
        b"\x00" * 100,
        b"\xff" * 100,
        b"{}",
        PAYLOADS["none"].hex().encode(),
    )
    yield from (pickle.dumps({"x": 1}, protocol=n) for n in range(pickle.HIGHEST_PROTOCOL + 1))
    yield saved.getvalue()
    yield zlib.compress(PAYLOADS["none"])
    yield struct.pack("<Q", 2) + b"{}"


@pytest.mark.parametrize("data", list(other_formats()), ids=range(15))
def test_other_formats(data):
    assert "not a payload" in refused(data)
    with pytest.raises(PayloadError):
        peek_header(data)


def test_a_safetensors_file_of_somebody_else():
    assert "no header of fedpara-plugins" in refused(save(TENSORS))
    assert "no header of fedpara-plugins" in refused(save(TENSORS, metadata={"fedpara": "{}"}))


def test_a_checksum_that_would_stand_outside_the_table():
    text = b'{"__metadata__":{"fedpara":"' + MARK
    for digits in (b"", b"0000000", b"00000000", b"00000000" * 9):
        data = struct.pack("<Q", len(text)) + text + digits
        assert "no header of fedpara-plugins" in refused(data)
        assert "no header of fedpara-plugins" in refused(signed(data))


@pytest.mark.parametrize("data", [None, "text", 3, [1, 2], {"a": 1}])
def test_things_that_are_not_even_bytes(data):
    assert "expected bytes" in refused(data)


def test_bytes_of_other_types_are_read():
    for kind in (bytearray, memoryview):
        assert list(decode(kind(PAYLOADS["int8"])).tensors) == list(TENSORS)


def test_pickles_are_never_run():
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    body = pickle.dumps(Bomb())
    refused(body)
    payload = decode(container({"x": one("U8", [len(body)], 0, len(body))}, body))
    assert bytes(payload.tensors["x"].tolist()) == body


# --- headers ------------------------------------------------------------------------------------


def drop(key):
    return lambda header: header.pop(key)


def put(key, value):
    return lambda header: header.update({key: value})


@pytest.mark.parametrize("version", [0, 2, 10**9, -1])
def test_another_version_names_both(version):
    data = forged("int8", lambda header: header.update(version=version, plugin="9.8.7"))
    for read in (decode, peek_header):
        with pytest.raises(MismatchError, match=rf"version {version} .*9\.8\.7.* version 1 "):
            read(data)


def test_an_unknown_stage_names_both():
    with pytest.raises(MismatchError, match=r"'delta\+sz3'.*delta, int8, zlib.*install"):
        decode(forged("int8", put("codec", "delta+sz3")))
    assert peek_header(forged("int8", put("codec", "delta+sz3"))).codec == "delta+sz3"


WRONG = {
    "version": (True, 1.0, "1", None, [1]),
    "codec": (None, 3, [], "", "+", "zlib+delta", "delta+delta", "x" * 10**5),
    "reference": (None, 3, [], "", "0" * 64, "x" * 10**5),
    "model": (3, "x", []),
    "extra": (3, "x", []),
    "plugin": (None, 3, {}),
    "order": ([], [0, 0], [1], [-1], [0.0], [True], ["x"], {}, 3),
    "notes": (None, {}, [], [{}], [{}] * 4, [None] * 3, [[]] * 3, "xyz"),
}


@pytest.mark.parametrize(
    "change",
    [
        *(put(key, value) for key, values in WRONG.items() for value in values),
        *(drop(key) for key in WRONG),
        put("unheard of", 1),
    ],
)
def test_wrong_fields(change):
    refused(forged("int8", change))


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "}",
        ',"version":1}',
        ',"version":1,"version":1}',
        ',"version":1,"extra":{"a":NaN}}',
        ',"version":1e999}',
        ',"version":-Infinity}',
        ',"version":' + "9" * 5000 + "}",
        ',"version":' + "9" * 3_000_000 + "}",
        ',"version":' + "[" * 100_000,
        ',"version":' + "[" * 1000 + "]" * 1000 + "}",
        ',"version":' + '{"a":' * 1_000_000,
        ',"version":"' + '\\"' * 1_000_000,
        ',"version":"' + "\\" * 1_999_999,
        ',"version":' + "[" * 33 + "]" * 33 + "}",
    ],
    ids=range(15),
)
def test_json_that_is_malformed_deep_or_huge_is_refused(rest):
    data = forged("none", text='{"crc32":"00000000"' + rest)
    refused(data)
    with pytest.raises(PayloadError):
        peek_header(data)


@pytest.mark.parametrize("text", [3, None, [], {}, True])
def test_a_header_that_is_no_text(text):
    mark = '{"crc32":"00000000"'  # for the checksum's place, somewhere else in the table
    assert "no metadata 'fedpara'" in refused(pack({"__metadata__": {"x": mark, "fedpara": text}}))
    assert "no metadata 'fedpara'" in refused(pack({"__metadata__": [mark, text]}))
    assert "no metadata 'fedpara'" in refused(pack([mark, text]))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("[" * 31 + "]" * 31, "nested deeper than 32"),
        ('{"a":' * 31 + "1" + "}" * 31, "nested deeper than 32"),
        ("NaN", "not finite"),
        ("-Infinity", "not finite"),
        ("1e999", "not finite"),
        ("1" * 101, "101 digits"),
        ('{"a":1,"a":2}', "same key twice"),
        ("01", "malformed"),
    ],
)
def test_json_that_is_refused_inside_a_sound_header(value, said):
    _, inner, _ = parts(PAYLOADS["none"])
    text = json.dumps({**inner, "extra": {"x": "HERE"}}, separators=(",", ":"))
    assert decode(forged("none", text=text)).header.extra == {"x": "HERE"}
    assert said in refused(forged("none", text=text.replace('"HERE"', value)))


@pytest.mark.parametrize("notes", [[None], [3], [[]], ["x"], [[{}]]])
def test_notes_that_are_no_objects_do_not_even_reach_a_caller_who_peeks(notes):
    with pytest.raises(PayloadError, match="notes are not a list of objects"):
        peek_header(forged("lossless", put("notes", notes)))


def test_nesting_inside_text_does_not_count():
    extra = {"pattern": "[" * 100 + '\\"{' * 100}
    data = encode_payload({}, codec=parse_codec("none", STAGES), extra=extra)
    assert decode(data).header.extra == extra


def test_headers_beyond_4_mib_are_neither_written_nor_read():
    refused(struct.pack("<Q", 2**22 + 1) + PAYLOADS["none"][8:] + bytes(2**22))
    with pytest.raises(PayloadError, match="header of at most"):
        encode_payload({}, codec=parse_codec("none", STAGES), extra={"x": "a" * 2**22})


@pytest.mark.parametrize("size", [0, 1, 10_000, 2**22, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_declared_header_sizes(size):
    message = refused(struct.pack("<Q", size) + PAYLOADS["int8"][8:])
    assert ("no header of fedpara-plugins" if size == 1 else f"would have {size};") in message


# --- the container --------------------------------------------------------------------------------


def one(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def container(table, body, *, codec="none", notes=()):
    inner = parts(PAYLOADS["none"])[1]
    inner.update(codec=codec, notes=list(notes), order=None)
    text = json.dumps(inner, separators=(",", ":"))
    return pack({"__metadata__": {"fedpara": text}, **table}, body)


def test_the_container_helper_makes_payloads_that_decode():
    data = container({"x": one("F32", [2], 0, 8)}, bytes(8))
    assert torch.equal(decode(data).tensors["x"], torch.zeros(2))


@pytest.mark.parametrize(
    ("table", "body"),
    [
        ({"x": one("F32", [2], 0, 8), "y": one("F32", [2], 0, 8)}, bytes(8)),
        ({"x": one("F32", [2], 0, 8), "y": one("F32", [2], 4, 12)}, bytes(12)),
        ({"x": one("F32", [2], 4, 12)}, bytes(12)),
        ({"x": one("F32", [2], 0, 8)}, bytes(9)),
        ({"x": one("F32", [3], 0, 8)}, bytes(8)),
        ({"x": one("F32", [2], 8, 0)}, bytes(8)),
        ({"x": one("F32", [2**62], 0, 8)}, bytes(8)),
        ({"x": one("F32", [2**62], 0, 2**64)}, bytes(8)),
        ({"x": one("F32", [2**40, 2**40, 0], 0, 0)}, b""),
        ({"x": one("F32", [-2], 0, 8)}, bytes(8)),
        ({"x": one("F99", [2], 0, 8)}, bytes(8)),
        ({"x": one("BOOL", [2], 0, 2)}, b"\x01\x02"),
        ({"x": one("F32", [1000, 1000], 0, 4_000_000)}, bytes(4_000_000)),
        ({"x": 3}, b""),
        ({"x": {"dtype": "F32"}}, b""),
        ({"__metadata__": {}}, b""),
    ],
)
def test_tables_that_no_writer_makes(table, body):
    refused(container(table, body))


def test_a_tensor_that_stands_twice():
    entry = json.dumps(one("F32", [2], 0, 8)).encode()
    good = container({}, b"")
    text = good[8 : header_size(good)].rstrip()[:-1]
    body = bytes(8)
    assert list(decode(pack(text + b',"x":' + entry + b"}", body)).tensors) == ["x"]
    twice = pack(text + b',"x":' + entry + b',"x":' + entry + b"}", body)
    assert "same key twice" in refused(twice)


def test_huge_declared_sizes_are_refused_before_allocation():
    huge = [2**50]
    notes = {"names": ["x"], "shapes": [huge], "dtypes": ["F32"], "each": "0"}
    stream = {"stream": one("U8", [9], 0, 9)}
    refused_text = refused(container(stream, bytes(9), codec="zlib", notes=[notes]))
    assert f"{2**52} bytes, more than the limit of {LIMIT} bytes" in refused_text
    # Symbols of one byte that claim to be float64: 8 times as much.
    scale = {"dtypes": ["F64"], "each": "0", "scales": "AAAAAAAA8D8="}
    symbols = container({"x": one("I8", [1000], 0, 1000)}, bytes(1000), codec="int8", notes=[scale])
    assert "8000 bytes, more than the limit" in refused(symbols)
    assert decode(symbols, limit=8000).tensors["x"].dtype == torch.float64


def test_a_decompression_bomb_costs_no_memory():
    bomb = zlib.compress(bytes(50_000_000), 9)
    notes = {"names": ["x"], "shapes": [[LIMIT]], "dtypes": ["U8"], "each": "0"}
    stream = {"stream": one("U8", [len(bomb)], 0, len(bomb))}
    data = container(stream, bomb, codec="zlib", notes=[notes])
    tracemalloc.start()
    try:
        assert "got more" in refused(data, limit=len(bomb))
        assert "container's body" in refused(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 700_000


# The dearest of those tried, without strings and with them.
@pytest.mark.parametrize("unit", [pytest.param("[[]],", marks=pytest.mark.long), '"ab",'])
def test_the_largest_header_costs_bounded_memory(unit):
    space = (2**22 - 1000) // len(json.dumps(unit)[1:-1])
    text = '{"crc32":"00000000","extra":[' + unit * space + "0]}"
    data = forged("none", text=text)
    tracemalloc.start()
    try:
        assert "objects of the payload's header" in refused(data)
        small = tracemalloc.get_traced_memory()[1]
        assert "not a JSON object with a version" in refused(data, limit=2**31)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert small < 12 * 2**20
    assert peak < 40 * 2**22


@pytest.mark.parametrize("unit", ["[],", "[0],", "{},", '{"a":0},', '"ab",', "1e9,", "[[]],", "é"])
def test_the_objects_of_a_header_take_no_more_than_was_reckoned(unit):
    text = '{"a":[' + unit * (2**18 // len(unit)) + "0]}"
    if unit == "é":
        text = json.dumps({"a": unit * 2**18}, ensure_ascii=False)
    tracemalloc.start()
    try:
        found = strict_json(text)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found["a"]
    assert peak < json_cost(text)


def test_more_dimensions_than_torch_computes_with_are_refused():
    """On a tensor of 300,000 dimensions a multiplication takes longer than anyone waited."""
    many = [1] * 65
    scale = {"dtypes": ["F32"], "each": "0", "scales": "AAAAAAAA8D8="}
    one_byte = container({"x": one("I8", many, 0, 1)}, bytes(1), codec="int8", notes=[scale])
    assert "65 dimensions" in refused(one_byte)
    body = zlib.compress(bytes(4))
    notes = {"names": ["x"], "shapes": [many], "dtypes": ["F32"], "each": "0"}
    stream = {"stream": one("U8", [len(body)], 0, len(body))}
    refused(container(stream, body, codec="zlib", notes=[notes]))
    notes["shapes"] = [many[:64]]
    assert decode(container(stream, body, codec="zlib", notes=[notes])).tensors["x"].ndim == 64
    with pytest.raises(PayloadError, match="33 dimensions"):
        encode_payload({"x": torch.zeros([1] * 33)}, codec=parse_codec("none"))
    for codec in ("none", "planes+zlib", "small"):
        sent = {"x": torch.zeros([1] * 32)}
        data = encode_payload(sent, codec=parse_codec(codec), reference=sent)
        assert decode_payload(data, limit=100, reference=sent).tensors["x"].ndim == 32


def test_more_tensors_than_a_payload_may_have_are_refused():
    count = MAX_TENSORS + 1
    notes = {"names": [str(i) for i in range(count)], "shapes": [[0]] * count}
    notes |= {"dtypes": ["U8"], "each": "0" * count}
    body = zlib.compress(b"")
    stream = {"stream": one("U8", [len(body)], 0, len(body))}
    data = container(stream, body, codec="zlib", notes=[notes])
    assert "objects of the payload's header" in refused(data)
    assert f"{count} tensors" in refused(data, limit=10**9)
    table = {f"{i:x}": one("U8", [0], 0, 0) for i in range(count)}
    assert f"{count} tensors" in refused(container(table, b""), limit=10**9)
