"""A second decoder by the words of docs/payload.md: quantise, topk, cast; plain Python only."""

from __future__ import annotations

import base64
import itertools
import json
import math
import struct
import zlib

import pytest
import torch

from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.testing.samples import SAMPLE_NAMES, finite_sample

LETTERS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b"}
LETTERS |= {"U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "?"}


def rounded(value, kind):
    """A number as the nearest of that kind, ties to even."""
    if kind == "BF16":  # the upper half of a float32
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return struct.unpack("<f", struct.pack("<I", bits))[0]
    return struct.unpack("<" + LETTERS[kind], struct.pack("<" + LETTERS[kind], value))[0]


def plain(raw, kind, count):
    if kind == "BF16":
        words = struct.unpack(f"<{count}H", raw)
        return [struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in words]
    if kind not in LETTERS:
        return list(raw)  # float8 and complex, as their bytes
    return list(struct.unpack(f"<{count}{LETTERS[kind]}", raw))


def unzlib(tensors, note):
    octets, at, found = zlib.decompress(tensors["stream"][2]), 0, {}
    for name, shape, digit in zip(note["names"], note["shapes"], note["each"], strict=True):
        kind = note["dtypes"][int(digit, 36)]
        width = getattr(torch, ALIAS[kind]).itemsize * math.prod(shape)
        found[name] = (kind, shape, octets[at : at + width])
        at += width
    assert at == len(octets)
    return values_of(found)


def values_of(tensors):
    return {n: (k, s, plain(raw, k, math.prod(s))) for n, (k, s, raw) in tensors.items()}


def unquantise(tensors, note):
    far = iter(tensors.pop(list(tensors)[-1])[2] if note["far"] else [])
    many = iter(tensors.pop(list(tensors)[-1])[2] if set(note["scopes"]) - {"t"} else [])
    kinds = [None if d == "-" else note["dtypes"][int(d, 36)] for d in note["each"]]
    scopes, raw, found = iter(note["scopes"]), base64.b64decode(note["steps"]), {}
    for (name, (held, shape, symbols)), kind in zip(tensors.items(), kinds, strict=True):
        if kind is None:
            found[name] = (held, shape, symbols)
            continue
        wide, scope = "F64" if kind == "F64" else "F32", next(scopes)
        size = {"t": len(symbols) or 1, "b": note["block"], "r": math.prod(shape[1:])}[scope]
        width = 8 if wide == "F64" else 4
        if scope == "t":
            steps, raw = plain(raw[:width], wide, 1), raw[width:]
        else:
            steps = list(itertools.islice(many, math.ceil(len(symbols) / size)))
        numbers = [next(far) if held == "I8" and q == -128 else q for q in symbols]
        products = [rounded(float(q) * steps[i // size], wide) for i, q in enumerate(numbers)]
        found[name] = (kind, shape, [rounded(product, kind) for product in products])
    return found


def untopk(tensors, note):
    gaps, found = iter(tensors.pop(list(tensors)[-1])[2]), {}
    for (name, (kind, held, kept)), shape in zip(tensors.items(), note["shapes"], strict=True):
        if shape is None:
            found[name] = (kind, held, kept)
            continue
        values, place = [0.0] * math.prod(shape), -1
        for value in kept:
            place += 1
            while (byte := next(gaps)) == 255:
                place += 255
            place += byte
            values[place] = value
        found[name] = (kind, shape, values)
    return found


def uncast(tensors, note):
    kinds = [None if d == "-" else note["dtypes"][int(d, 36)] for d in note["each"]]
    pairs = zip(tensors.items(), kinds, strict=True)
    return {name: (was or kind, shape, x) for (name, (kind, shape, x)), was in pairs}


ALIAS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ALIAS |= {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool"}
ALIAS |= {"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "C64": "complex64"}
ALIAS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
ALIAS |= {"F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz"}
UNDO = {"zlib": unzlib, "quantise": unquantise, "topk": untopk, "cast": uncast}


def by_the_page(data):
    """Name to (dtype's name, sizes, values) of a payload."""
    (size,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + size])
    header = json.loads(table.pop("__metadata__")["fedpara"])
    names = sorted(table)
    order = range(len(names)) if header["order"] is None else header["order"]
    tensors = {}
    for entry, name in ((table[names[i]], names[i]) for i in order):
        start, stop = entry["data_offsets"]
        raw = data[8 + size + start : 8 + size + stop]
        tensors[name] = (entry["dtype"], entry["shape"], raw)
    if not header["codec"].endswith("zlib"):
        tensors = values_of(tensors)
    stages = [] if header["codec"] == "none" else header["codec"].split("+")
    for stage, note in zip(reversed(stages), reversed(header["notes"]), strict=True):
        tensors = UNDO[stage](tensors, note)
    return tensors


def heavy():
    """Values far out, so that some symbols escape, in several tensors; halves and doubles."""
    draw = torch.Generator().manual_seed(3)
    wide = torch.randn(40, 33, generator=draw) * torch.randn(40, 33, generator=draw).exp() ** 2
    small = (wide[:9, :30] / wide.abs().max()).clone()
    return {"z": wide, "a": small.half(), "m": small.bfloat16(), "d": wide.double(), "n": wide[0]}


STATES = {**{name: lambda name=name: finite_sample(name) for name in SAMPLE_NAMES}, "heavy": heavy}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize(
    "codec",
    [
        "quantise:bits=5",
        "quantise:rms=0.05+zlib",
        "quantise:rms=2,scope=row+zlib",
        "quantise:bits=12,scope=block,block=16,rounding=stochastic+zlib",
        "topk:share=0.1+quantise:rms=0.05,scope=row",
        "topk:count=2+zlib",
        "cast:to=bf16+zlib",
    ],
)
def test_the_page_is_enough_to_decode(name, codec):
    tensors = STATES[name]()
    if codec.startswith("cast") and name == "extremes":
        tensors["large"] = tensors["large"] / 2  # beyond bfloat16 by intent
    data = encode_payload(tensors, codec=parse_codec(codec))
    ours = decode_payload(data, limit=10**6).tensors
    found = by_the_page(data)
    assert list(found) == list(ours) == list(tensors)
    for key, (kind, shape, values) in found.items():
        assert (getattr(torch, ALIAS[kind]), tuple(shape)) == (ours[key].dtype, ours[key].shape)
        flat = ours[key].reshape(-1)
        if kind not in LETTERS and kind != "BF16":
            flat = flat.view(torch.uint8)
        assert values == flat.tolist(), key


def test_the_sample_with_far_values_does_escape():
    data = encode_payload(heavy(), codec=parse_codec("quantise:rms=0.05"))
    assert b'\\"far\\":0' not in data
