"""A second decoder, by the words of docs/payload.md alone: Python's integers and floats.

It uses nothing of this library: only `zlib`, and `zstandard` for a Zstandard frame. Tensors are
(dtype's name, sizes, values) by name; values of float8 and complex tensors are their bytes.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import struct
import zlib
from pathlib import Path

__all__ = [
    "LETTERS",
    "by_the_page",
    "description_by_the_page",
    "joint_by_the_page",
    "reference_by_the_page",
    "roll_by_the_page",
]

LETTERS = {"F64": "d", "F32": "f", "F16": "e", "I64": "q", "I32": "i", "I16": "h", "I8": "b"}
LETTERS |= {"U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "?"}
WIDTHS = {kind: struct.calcsize("<" + letter) for kind, letter in LETTERS.items()}
WIDTHS |= {"BF16": 2, "C64": 8, "C128": 16}
WIDTHS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1)
FLOATS = ("F64", "F32", "F16", "BF16")


def rounded(value, kind):
    """A number as the nearest of that kind, ties to even."""
    if kind == "BF16":  # the upper half of a float32
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
        return struct.unpack("<f", struct.pack("<I", bits))[0]
    return struct.unpack("<" + LETTERS[kind], struct.pack("<" + LETTERS[kind], value))[0]


def plain(raw, kind, count):
    """The values behind some bytes."""
    if kind == "BF16":
        words = struct.unpack(f"<{count}H", raw)
        return [struct.unpack("<f", struct.pack("<I", word << 16))[0] for word in words]
    if kind not in LETTERS:
        return list(raw)
    return list(struct.unpack(f"<{count}{LETTERS[kind]}", raw))


def kinds_of(note):
    """A dtype's name for each tensor, or None where it passed."""
    return [None if digit == "-" else note["dtypes"][int(digit, 36)] for digit in note["each"]]


def laid_out(note):
    """Name, dtype's name and sizes of each tensor of a stream."""
    return list(zip(note["names"], kinds_of(note), note["shapes"], strict=True))


def cut(octets, layout):
    """Tensors whose bytes stand one after the other, to the last byte."""
    at, found = 0, {}
    for name, kind, shape in layout:
        end = at + WIDTHS[kind] * math.prod(shape)
        found[name] = (kind, shape, plain(octets[at:end], kind, math.prod(shape)))
        at = end
    assert at == len(octets)
    return found


def stream_of(tensors):
    """The bytes of the only tensor."""
    ((name, (kind, shape, values)),) = tensors.items()
    assert (name, kind, len(shape)) == ("stream", "U8", 1)
    return bytes(values)


def unzlib(tensors, note, _):
    return cut(zlib.decompress(stream_of(tensors)), laid_out(note))


def unzstd(tensors, note, _):
    import zstandard

    stream = stream_of(tensors)
    return cut(zstandard.decompress(stream) if stream else b"", laid_out(note))


def unans(tensors, note, _):
    stream, layout = stream_of(tensors), laid_out(note)
    sides = {side: [] for side in "s-"}
    for entry, side in zip(layout, note["coded"], strict=True):
        sides[side].append(entry)
    n = sum(math.prod(shape) for _, _, shape in sides["s"])
    lowest, p, e, w = struct.unpack_from("<iIII", stream)
    words, rest = stream[16 : 16 + 2 * w], zlib.decompress(stream[16 + 2 * w :])
    if not n:
        assert (lowest, p, e, w) == (0, 0, 0, 0)
        found = cut(rest, sides["-"])
        return {name: found.get(name, (kind, shape, [])) for name, kind, shape in layout}
    lanes = next(size for k in range(3, 13) if 768 * (size := 2**k) >= n or size == 4096)
    x = list(struct.unpack_from(f"<{lanes}I", rest))
    f = struct.unpack_from(f"<{p + 1}H", rest, 4 * lanes)
    assert sum(f) == 2**14
    widest = max((kind for _, kind, _ in sides["s"]), key=WIDTHS.get)
    at = 4 * lanes + 2 * (p + 1)
    escaped = iter(struct.unpack_from(f"<{e}{LETTERS[widest]}", rest, at))
    c = [0, *itertools.accumulate(f)]
    word, symbols = iter(struct.unpack(f"<{w}H", words)), []
    for i in range(n):
        state = x[i % lanes]
        slot = state % 2**14
        (k,) = (k for k in range(p + 1) if c[k] <= slot < c[k] + f[k])
        symbols.append(next(escaped) if k == p else lowest + k)
        state = f[k] * (state // 2**14) + slot - c[k]
        x[i % lanes] = state if state >= 2**16 else 2**16 * state + next(word)
    assert set(x) == {2**16}
    assert not [*word, *escaped]
    found, row = cut(rest[at + e * WIDTHS[widest] :], sides["-"]), iter(symbols)
    for name, kind, shape in sides["s"]:
        found[name] = (kind, shape, list(itertools.islice(row, math.prod(shape))))
    return {name: found[name] for name, _, _ in layout}


def unplanes(tensors, note, _):
    found = {}
    for (name, (held, shape, octets)), kind in zip(tensors.items(), kinds_of(note), strict=True):
        if kind is None:
            found[name] = (held, shape, octets)
            continue
        bits, count = 8 * WIDTHS[kind], math.prod(shape[1:])
        assert (held, 8 * shape[0]) == ("U8", bits)
        planes = [octets[k * count : (k + 1) * count] for k in range(shape[0])]
        words = [
            sum(octet << 8 * k for k, octet in enumerate(one)) for one in zip(*planes, strict=True)
        ]
        if kind in FLOATS:
            words = [word >> 1 | (word & 1) << bits - 1 for word in words]
        else:  # 2 v, or -2 v - 1
            words = [(-(word + 1) // 2 if word & 1 else word // 2) % 2**bits for word in words]
        raw = b"".join(word.to_bytes(bits // 8, "little") for word in words)
        found[name] = (kind, shape[1:], plain(raw, kind, count))
    return found


def wide(kind):
    return "F64" if kind == "F64" else "F32"


def unint8(tensors, note, _):
    scales, found = iter(plain_all(base64.b64decode(note["scales"]), "F64")), {}
    for (name, (held, shape, symbols)), kind in zip(tensors.items(), kinds_of(note), strict=True):
        values = symbols
        if kind is not None:
            scale = next(scales)
            products = [rounded(q * scale, wide(kind)) for q in symbols]
            values = [rounded(product, kind) for product in products]
        found[name] = (kind or held, shape, values)
    return found


def plain_all(raw, kind):
    return plain(raw, kind, len(raw) // WIDTHS[kind])


def unquantise(tensors, note, _):
    far = iter(tensors.pop(list(tensors)[-1])[2] if note["far"] else [])
    many = iter(tensors.pop(list(tensors)[-1])[2] if set(note["scopes"]) - {"t"} else [])
    scopes, raw, found = iter(note["scopes"]), base64.b64decode(note["steps"]), {}
    for (name, (held, shape, symbols)), kind in zip(tensors.items(), kinds_of(note), strict=True):
        if kind is None:
            found[name] = (held, shape, symbols)
            continue
        exact, scope = wide(kind), next(scopes)
        size = {"t": len(symbols) or 1, "b": note["block"], "r": math.prod(shape[1:])}[scope]
        if scope == "t":
            steps, raw = plain(raw[: WIDTHS[exact]], exact, 1), raw[WIDTHS[exact] :]
        else:
            steps = list(itertools.islice(many, math.ceil(len(symbols) / size)))
        numbers = [next(far) if held == "I8" and q == -128 else q for q in symbols]
        floats = [rounded(float(q), exact) for q in numbers]
        products = [rounded(q * steps[i // size], exact) for i, q in enumerate(floats)]
        found[name] = (kind, shape, [rounded(product, kind) for product in products])
    return found


def untopk(tensors, note, _):
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


def uncast(tensors, note, _):
    pairs = zip(tensors.items(), kinds_of(note), strict=True)
    return {name: (was or kind, shape, x) for (name, (kind, shape, x)), was in pairs}


def undelta(tensors, note, reference):
    found = {}
    for place, (name, (kind, shape, values)) in enumerate(tensors.items()):
        if kind in FLOATS and place not in note.get("whole", []):
            assert reference[name][:2] == (kind, shape)
            sums = zip(reference[name][2], values, strict=True)
            values = [rounded(r + d, kind) for r, d in sums]
        found[name] = (kind, shape, values)
    return found


def ungrid(tensors, note, reference):
    exponents, found = iter(note["exponents"]), {}
    for (name, (held, shape, symbols)), kind in zip(tensors.items(), kinds_of(note), strict=True):
        values = symbols
        if kind is not None:
            assert reference[name][:2] == (kind, shape)
            step, base = 2.0 ** next(exponents), reference[name][2]
            pairs = zip(base, symbols, strict=True)
            values = [rounded(r + k * step, kind) if k else r for r, k in pairs]
        found[name] = (kind or held, shape, values)
    return found


UNDO = {"zlib": unzlib, "zstd": unzstd, "ans": unans, "planes": unplanes, "int8": unint8}
UNDO |= {"quantise": unquantise, "topk": untopk, "cast": uncast, "delta": undelta, "grid": ungrid}


def opened(data):
    """Header, and the tensors of a payload in their order; the checksum holds."""
    (size,) = struct.unpack("<Q", data[:8])
    mark = b'{\\"crc32\\":\\"'
    place = data.index(mark) + len(mark)
    assert place < 8 + size
    blank = data[:place] + b"00000000" + data[place + 8 :]
    assert data[place : place + 8] == b"%08x" % zlib.crc32(blank)
    table = json.loads(data[8 : 8 + size])
    header = json.loads(table.pop("__metadata__")["fedpara"])
    names = sorted(table)
    order = range(len(names)) if header["order"] is None else header["order"]
    tensors = {}
    for name in (names[i] for i in order):
        entry = table[name]
        start, stop = (8 + size + end for end in entry["data_offsets"])
        count = math.prod(entry["shape"])
        values = plain(data[start:stop], entry["dtype"], count)
        tensors[name] = (entry["dtype"], entry["shape"], values)
    return header, tensors


PAGE = Path(__file__).resolve().parents[2] / "docs" / "payload.md"
PICTURES = {0x2400 + byte: byte for byte in range(1, 8)}


def dictionary():
    """The page's dictionary."""
    _, _, rest = PAGE.read_text().partition("**The dictionary** is these lines")
    lines = itertools.takewhile(lambda line: line.startswith("    "), rest.split("\n")[2:])
    return "".join(line[4:] for line in lines).translate(PICTURES).encode()


def unpacked(packed):
    """The text and the raw bytes in a packed header."""
    stream = zlib.decompressobj(wbits=-15, zdict=dictionary())
    plain = stream.decompress(packed)
    assert stream.eof
    assert stream.unused_data == bytes(len(stream.unused_data)) < bytes(8)
    text, _, raw = plain.partition(b"\0")
    return text, raw


def header_of(text, raw, lines):
    """The header that a text and raw bytes stand for."""

    def taken(found):
        nonlocal raw
        size = 32 if found[1] is None else int(found[1])
        part, raw = raw[:size], raw[size:]
        assert len(part) == size
        return part.hex().encode() if found[1] is None else base64.b64encode(part)

    text = re.sub(rb"\x05([0-9]{1,9})\x06|\x07", taken, text)
    assert not raw
    assert text.isascii()
    for byte, line in enumerate(lines, 1):
        text = text.replace(bytes([byte]), line)
    return json.loads(text)


def opened_2(data, descriptions):
    """The same of a payload of version 2."""
    checksum, size, digest = struct.unpack("<II16s", data[4:28])
    assert checksum == zlib.crc32(data[8:])
    lines = descriptions[digest].split(b"\n") if any(digest) else ()
    return with_body(header_of(*unpacked(data[28 : 28 + size]), lines), data[28 + size :])


def with_body(header, data):
    """A header, and the tensors whose bytes these are."""
    layout, tensors, at = laid_out(header), {}, 0
    for name, kind, shape in sorted(layout, key=lambda entry: -min(WIDTHS[entry[1]], 8)):
        end = at + WIDTHS[kind] * math.prod(shape)
        tensors[name] = (kind, shape, plain(data[at:end], kind, math.prod(shape)))
        at = end
    assert at == len(data)
    return header, {name: tensors[name] for name, _, _ in layout}


def description_by_the_page(model, tensors):
    """Hash and text of a description, from the model and decoded tensors (as `by_the_page`)."""
    more = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16")
    shapes = [list(shape) for _, shape, _ in tensors.values()]
    planes = [
        [WIDTHS[kind], *shape] if kind in more and shape else list(shape)
        for kind, shape, _ in tensors.values()
    ]
    written = [json.dumps(part).replace(", ", ",") for part in (shapes, planes)]
    names = ",".join(json.dumps(name) for name in tensors)
    model = json.dumps(model, separators=(",", ":"))
    text = "\n".join([model, names, *(part[1:-1] for part in written)]).encode()
    return hashlib.sha256(text).digest()[:16], text


def opened_3(data, descriptions, rolls):
    """The same of each record of a joint payload, by name."""
    checksum, size, digest = struct.unpack("<II16s", data[4:28])
    assert data[:4] == b"FPP3"
    assert checksum == zlib.crc32(data[8:])
    roll = json.loads(rolls[digest]) if any(digest) else []
    text, raw = unpacked(data[28 : 28 + size])
    lines, rest, found = text.split(b"\n"), data[28 + size :], {}
    sizes = []
    for _ in range(len(lines) // 2 - 1):
        number = shift = 0
        while True:
            byte, raw = raw[0], raw[1:]
            number += byte % 128 << shift
            shift += 7
            if byte < 128:
                break
        sizes.append(number)
    sizes.append(len(rest) - sum(sizes))
    for place, size in enumerate(sizes):
        head, line = lines[2 * place : 2 * place + 2]
        if not head:
            name, described, reference, count = roll[place]
        else:
            name, described, *more = json.loads(head)
            reference, count = "", more[0] if more else None
            if count is None:
                _, described, _, count = roll[described]
        line = re.sub(rb"(.)\x10", lambda found, n=count: found[1] * n, line)
        line = line.replace(b"\x12", b"%d" % size)
        octets = b""

        def taken(mark, reference=reference, count=count):
            nonlocal raw, octets
            if mark[0] == b"\x0e":
                octets += bytes.fromhex(reference)
                return b"\x07"
            wide = 32 if mark[0] == b"\x07" else 4 * count if mark[0] == b"\x11" else int(mark[1])
            octets, raw = octets + raw[:wide], raw[wide:]
            return b"\x05%d\x06" % wide if mark[0] == b"\x11" else mark[0]

        line = re.sub(rb"\x05([0-9]{1,9})\x06|[\x07\x0e\x11]", taken, line)
        digest = bytes.fromhex(described)
        pieces = descriptions[digest].split(b"\n") if any(digest) else ()
        found[name] = with_body(header_of(line, octets, pieces), rest[:size])
        rest = rest[size:]
    assert not raw
    return found


def roll_by_the_page(records):
    """Hash and text of a roll, from (name, hash of the description, reference, count)."""
    text = json.dumps([list(row) for row in records], separators=(",", ":")).encode()
    return hashlib.sha256(text).digest()[:16], text


def joint_by_the_page(data, references, descriptions, rolls):
    """What `by_the_page` returns for each record of a joint payload."""
    opened = opened_3(data, descriptions, rolls)
    return {name: undone(*parts, references.get(name)) for name, parts in opened.items()}


def by_the_page(data, reference=None, descriptions=None):
    """Name to (dtype's name, sizes, values) of a payload.

    ``reference`` is the decoder's answer to another payload, that of the state coded against;
    ``descriptions`` are texts by their hash.
    """
    if data[:4] == b"FPP2":
        header, tensors = opened_2(data, descriptions or {})
    else:
        header, tensors = opened(data)
        assert header["version"] == 1
    return undone(header, tensors, reference)


def undone(header, tensors, reference):
    """The tensors before all stages."""
    stages = [] if header["codec"] == "none" else header["codec"].split("+")
    for stage, note in zip(reversed(stages), reversed(header["notes"]), strict=True):
        tensors = UNDO[stage](tensors, note, reference)
    return tensors


def reference_by_the_page(data):
    """The hash of the state in a payload of codec ``none``."""
    (size,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + size])
    digest = hashlib.sha256()
    for name in sorted(table.keys() - {"__metadata__"}, key=str.encode):
        entry = table[name]
        for text in (name.encode(), entry["dtype"].encode()):
            digest.update(struct.pack("<Q", len(text)) + text)
        digest.update(
            struct.pack(f"<{len(entry['shape']) + 1}Q", len(entry["shape"]), *entry["shape"])
        )
        start, stop = (8 + size + end for end in entry["data_offsets"])
        digest.update(data[start:stop])
    return digest.hexdigest()
