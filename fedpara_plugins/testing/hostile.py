"""Payloads as an attacker makes them: taken apart, damaged, and signed again.

The checksum detects accidents but stops no attacker. Damage that is to reach the code behind the
checksum therefore needs `signed`. This project's tests and fuzzer use this module; it is also
useful for tests of a new stage.
"""

from __future__ import annotations

import json
import random
import re
import struct
import zlib
from collections.abc import Mapping
from typing import Any

from fedpara_plugins.codecs import PRESETS, Codec, Stage, decoders, parse_codec
from fedpara_plugins.codecs.compact import MAGIC, is_compact
from fedpara_plugins.codecs.header_packing import WORDS
from fedpara_plugins.errors import ConfigError, FedParaError

__all__ = ["check_refusal", "damaged", "every_codec", "pack", "parts", "signed"]

MARK = b'{\\"crc32\\":\\"'
"""The bytes before the checksum's eight digits."""

_PIECE = re.compile(rb"[\x01-\x04]")
_STANDS_FOR = re.compile(rb'"<([1-4])>"')
_WRITTEN = re.compile(rb"\\u000([5-7])")
"""References to the description and to raw bytes in a header of version 2, as they stand there,
and while its JSON is changed."""

_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 255, 2**31, 2**62, 2**64, 2**70, 1.5, -0.0, 1e300, 5e-324),
    *("", "x", "é", "-", "0", "F32", "BOOL", "I8", "AAAAAAAA8D8=", "AAAAAAAA+H8=", "zlib", "delta"),
    *([], [0], [-1], [2**62], [2**40, 2**40, 0], [[]], [None], {}, {"x": []}),
)
_WITH_OPTIONS = (
    *("cast:to=fp16", "cast:to=bf16+zlib", "delta+topk:share=0.3", "topk:share=0.1+zlib"),
    *("quantise:bits=1", "quantise:bits=4,scope=row", "quantise:bits=16,scope=block"),
    *("delta+quantise:rms=2,rounding=stochastic+zlib", "delta+topk:share=0.3+quantise:bits=8+zlib"),
)
_PIECES = (b"0", b"9", b"-", b"e", b".", b'"', b"[", b"]", b"{", b"}", b",", b":", b"\\", b"\x00")


def every_codec(stages: Mapping[str, Stage]) -> dict[str, Codec]:
    """Return every codec that can encode here, by its text: presets, and stages in several places.

    Each stage is used alone, before ``zlib``, after ``delta``, and between the two. The word
    ``entropy`` becomes the preferred coder whose library is installed.

    Args:
        stages: by name.
    """
    usable = set(decoders())
    texts = [*PRESETS, *_WITH_OPTIONS, *(name for name in stages if name not in PRESETS)]
    texts += [f"{stage}+zlib" for stage in stages] + [f"delta+{stage}" for stage in stages]
    texts += [f"delta+{stage}+zlib" for stage in stages]
    found: dict[str, Codec] = {}
    for text in texts:
        try:
            codec = parse_codec(text, stages).resolved(usable)
        except ConfigError:  # a stage twice, or after an entropy coder
            continue
        if all(stage.name in usable for stage in codec.stages if stage.entropy):
            found[text] = codec
    return found


LONGEST_MESSAGE = 3000
"""Largest length of an error's text in characters. It goes into logs and may quote a stranger."""


def check_refusal(error: FedParaError) -> None:
    """Raise unless an error refuses bytes properly: in words, early, and for the right reason.

    Raises:
        AssertionError: the text is too long, has control characters, or says that memory was short
            or that a stage failed for an unknown reason.
    """
    text = str(error)
    assert len(text) <= LONGEST_MESSAGE, f"a text of {len(text)} characters: {text[:200]!r}"
    assert text.isprintable(), f"a text that would write more than a line: {text[:500]!r}"
    for words in ("MemoryError", "can't allocate", "not enough memory", "failed to decode"):
        assert words not in text, f"refused for the wrong reason: {text[:500]!r}"


def signed(data: bytes) -> bytes:
    """Return the bytes with a correct checksum, if they still have a place for one."""
    if is_compact(data):
        return data[:4] + struct.pack("<I", zlib.crc32(data[8:])) + data[8:]
    place = data.find(MARK) + len(MARK)
    if place < len(MARK) or len(data) < place + 8:
        return data
    digits = b"%08x" % zlib.crc32(data[:place] + b"00000000" + data[place + 8 :])
    return data[:place] + digits + data[place + 8 :]


def pack(table: Any, body: bytes = b"") -> bytes:
    """Return a signed container with any table: an object to write as JSON, or the text itself."""
    is_text = isinstance(table, bytes)
    text = table if is_text else json.dumps(table, separators=(",", ":")).encode()
    return signed(struct.pack("<Q", len(text)) + text + body)


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Split a payload into the container's table, this project's header in it, and the body.

    Raises:
        ValueError, KeyError, TypeError, struct.error: the bytes are not a payload.
    """
    size = 8 + struct.unpack_from("<Q", data)[0]
    table = json.loads(data[8:size])
    return table, json.loads(table["__metadata__"]["fedpara"]), data[size:]


def damaged(data: bytes, draw: random.Random) -> bytes:
    """Return damaged bytes: with a change in the header, the table, the body, or anywhere.

    Args:
        data: a payload, or what is left of one.
        draw: decides on the damage; the same state gives the same damage.
    """
    if is_compact(data):
        return _damaged_compact(data, draw)
    try:
        table, header, body = parts(data)
    except (ValueError, KeyError, TypeError, RecursionError, struct.error):
        if data[:1] == b"{":
            return _damaged_lines(data, draw)
        return signed(_damaged_bytes(data, draw))
    kind = draw.random()
    if kind < 0.15:
        whole = _damaged_bytes(data, draw)
        return whole if draw.random() < 0.1 else signed(whole)
    tensors = {name: entry for name, entry in table.items() if name != "__metadata__"}
    if kind < 0.5:
        _change_somewhere(header, draw)
    elif kind < 0.6:
        _change_somewhere(tensors, draw)
    else:
        body = _damaged_bytes(body, draw, keep_size=draw.random() < 0.7)
    text = json.dumps(header, separators=(",", ":"))
    return pack({"__metadata__": {"fedpara": text}, **tensors}, body)


def _damaged_compact(data: bytes, draw: random.Random) -> bytes:
    """Change the text of a header of version 2, its raw bytes, or any of the payload's bytes."""
    kind = draw.random()
    try:
        size, digest = struct.unpack_from("<I16s", data, 8)
        packed, body = data[28 : 28 + size], data[28 + size :]
        plain = zlib.decompressobj(wbits=-15, zdict=WORDS).decompress(packed, 2**20)
    except (struct.error, zlib.error):
        kind = 0.0
    if kind < 0.2:
        whole = _damaged_bytes(data, draw)
        return whole if draw.random() < 0.1 else signed(whole)
    text, zero, raw = plain.partition(b"\0")
    if kind < 0.6:
        text = _damaged_text(text, draw)
    elif kind < 0.7:
        raw = _damaged_bytes(raw, draw, keep_size=draw.random() < 0.7)
    else:
        body = _damaged_bytes(body, draw, keep_size=draw.random() < 0.7)
    if draw.random() < 0.05:
        digest = bytes(16) if any(digest) else b"?" * 16
    pack = zlib.compressobj(1, wbits=-15, zdict=WORDS)
    packed = pack.compress(text + (zero or (raw and b"\0")) + raw) + pack.flush()
    return signed(MAGIC + bytes(4) + struct.pack("<I16s", len(packed), digest) + packed + body)


def _damaged_text(text: bytes, draw: random.Random) -> bytes:
    """Change one value of a header, or any of its text's bytes, references to pieces included."""
    if draw.random() < 0.4:
        return _damaged_bytes(text, draw)
    try:
        # JSON has no raw control characters: the pieces become texts while a value is changed.
        header = json.loads(_PIECE.sub(lambda found: b'"<%d>"' % found[0][0], text), strict=False)
        _change_somewhere(header, draw)
        changed = json.dumps(header, separators=(",", ":")).encode()
    except (ValueError, TypeError, RecursionError):
        return _damaged_bytes(text, draw)
    changed = _WRITTEN.sub(lambda found: bytes([int(found[1], 16)]), changed)
    return _STANDS_FOR.sub(lambda found: bytes([int(found[1])]), changed)


def _damaged_lines(data: bytes, draw: random.Random) -> bytes:
    """Change one of several JSON lines, or any of their bytes."""
    lines = data.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    try:
        values = json.loads(lines[place])
    except ValueError:
        return _damaged_bytes(data, draw)
    if not isinstance(values, dict) or draw.random() < 0.3:
        return _damaged_bytes(data, draw)
    _change_somewhere(values, draw)
    lines[place] = json.dumps(values).encode() + b"\n"
    return b"".join(lines)


def _damaged_bytes(data: bytes, draw: random.Random, *, keep_size: bool = False) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4, 16))):
        place = draw.randrange(len(changed) + 1)
        kind = draw.randrange(2 if keep_size else 6)
        if kind == 0 and place < len(changed):
            changed[place] ^= 1 << draw.randrange(8)
        elif kind == 1 and place < len(changed):
            changed[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        elif kind == 2:
            del changed[place : place + draw.randint(1, 9)]
        elif kind == 3:
            changed[place:place] = draw.choice(_PIECES) * draw.randint(1, 4)
        elif kind == 4 and changed:
            other = draw.randrange(len(changed))
            changed[place:place] = changed[other : other + draw.randint(1, 30)]
        elif kind == 5:
            del changed[place:]
    return bytes(changed)


def _change_somewhere(root: Any, draw: random.Random) -> None:
    """Replace, delete, double or slightly change one value anywhere in a JSON object or list."""
    target = root
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        if not keys:
            return
        key = draw.choice(keys)
        inner = target[key]
        if isinstance(inner, dict | list) and inner and draw.random() < 0.85:
            target = inner
            continue
        break
    kind = draw.random()
    if kind < 0.15:
        del target[key]
    elif kind < 0.3 and isinstance(inner, str | list):
        twice: Any = inner * 2
        target[key] = draw.choice((twice, inner[:-1], inner[::-1]))
    elif kind < 0.5 and type(inner) is int:
        target[key] = inner + draw.choice((-1, 1, 7, 2**32))
    elif kind < 0.6 and isinstance(inner, str) and inner:
        place = draw.randrange(len(inner))
        target[key] = inner[:place] + draw.choice("09azAZ-_+=/") + inner[place + 1 :]
    else:
        target[key] = draw.choice(_STRANGE)
