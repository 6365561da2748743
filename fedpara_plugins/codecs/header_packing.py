"""The text of a header of version 2 as few bytes: pieces of a description, raw values, deflate.

``docs/payload.md`` specifies the bytes. Every size is checked before memory is allocated.
"""

from __future__ import annotations

import base64
import binascii
import re
import zlib

from fedpara_plugins.codecs.description import Description
from fedpara_plugins.errors import PayloadError

__all__ = ["WORDS", "deflate_text", "inflate_text", "pack_text", "unpack_text"]

WORDS = (
    b'"private":[],"own":{},"weights":[["fingerprint":"","seed":0,"lowrank","pfedpara","fedpara",['
    b'"F64","BF16","F16","I64","I32","I16","BOOL","weight","bias","running_mean","running_var",'
    b'"num_batches_tracked","lora_A.weight","lora_B.weight","topk+cast:"base":{"kind":"zeros","layo'
    b'ut":"eJ"seeded","codecs":["delta+quantise:rms=0.05+entropy:prefer=zstd","delta+feedback+quant'
    b'ise:rms=2+entropy:prefer=ans"],"whole":[],"exponents":[-10,-9,-8,-7,-6,"scopes":"rrrrrrrrbbbb'
    b'","block":64,{"plugin":"0.1.0","codec":"delta+int8+zlib","reference":"\x07","model":null,"extr'
    b'a":null,"notes":[{},{"dtypes":["F32"],"each":"00000000","scales":"\x05192\x06"},{"names":[\x02'
    b'],"shapes":[\x03],"dtypes":["I8","I64"],"each":"000000001-0000001"},"names":[\x02,"steps","far'
    b'","gaps"],"shapes":[\x03,[1]],"dtypes":["I8","F32"],"each":"0000000011111111","coded":"--------'
    b'ssssssss-s-s-s-s"}],{"plugin":"0.1.0","codec":"planes+zstd","reference":null,"model":\x01,"ext'
    b'ra":null,"notes":[{"dtypes":["F32"],"each":"00000000-00"},{"names":[\x02],"shapes":[\x04],"dty'
    b'pes":["U8","I64"],"each":"00000000100"}],"names":["stream"],"shapes":[[{"plugin":"0.1.0","cod'
    b'ec":"none","reference":null,"model":\x01,"extra":null,"notes":[],"names":[\x02],"shapes":[\x03]'
    b',"dtypes":["F32"],"each":"00000000"}{"plugin":"0.1.0","codec":"grid+ans","reference":"\x07","mo'
    b'del":\x01,"extra":null,"notes":[{"dtypes":["F32"],"each":"0000000000","exponents":[-8,-8,-8,-8'
    b'{"plugin":"0.1.0","codec":"delta+quantise+zstd","reference":"\x07","model":\x01,"extra":{"deco'
    b'ders":["zlib","ans","zstd","payload2"]},"notes":[{},{"dtypes":["F32"],"each":"000000000000000'
    b'0","scopes":"tttttttttttttttt","block":0,"steps":"\x0596\x06","far":0},{"names":[\x02],"shapes"'
    b':[\x03],"dtypes":["I8"],"each":"00000000"}],"names":["stream"],"shapes":[[9]],"dtypes":["U8"],'
    b'"each":"0"}{"plugin":"0.1.0","codec":"delta+quantise+ans","reference":"\x07","model":\x01,"ext'
    b'ra":{"decoders":["zlib","ans","payload2"]},"notes":[{},{"dtypes":["F32"],"each":"000000000000'
    b'0000","scopes":"tttttttttttttttt","block":0,"steps":"\x05192\x06","far":0},{"names":[\x02],"sha'
    b'pes":[\x03],"dtypes":["I8"],"each":"00000000","coded":"ssssssss"}],"names":["stream"],"shapes"'
    b':[[9]],"dtypes":["U8"],"each":"0"}'
)
"""What headers often contain, for the compressor; a part of the format."""

_HASH = re.compile(r'"([0-9a-f]{64})"')
_BASE64 = re.compile(r'"([A-Za-z0-9+/]{20,}={0,2})"')
_MARK = re.compile(r"\x05([0-9]{1,9})\x06|\x07")
_MOST_MARKS = 64
"""Hashes and numbers in a header; each takes time, however short, and codecs write a handful."""
_LEAST_VARIED = 12
"""Different characters from which on text in base64 is taken for numbers, which deflate packs
better as bytes."""
_HASH_SIZE = 32


def pack_text(text: str, description: Description | None) -> bytes:
    """Return a header's text as bytes.

    Args:
        text: JSON in ASCII.
        description: that the receiver holds; None for none.
    """
    raw: list[bytes] = []

    def hash_out(found: re.Match[str]) -> str:
        if len(raw) == _MOST_MARKS:
            return found[0]
        raw.append(bytes.fromhex(found[1]))
        return '"\x07"'

    def numbers_out(found: re.Match[str]) -> str:
        octets = _from_base64(found[1])
        if octets is None or len(raw) == _MOST_MARKS or len(set(found[1])) < _LEAST_VARIED:
            return found[0]
        raw.append(octets)
        return f'"\x05{len(octets)}\x06"'

    if description is not None:
        text = description.shorten(text)
    text = _BASE64.sub(lambda m: (hash_out if _HASH.fullmatch(m[0]) else numbers_out)(m), text)
    return deflate_text(text, b"".join(raw))


def deflate_text(text: str, raw: bytes, *, level: int = 9) -> bytes:
    """Return a text of ASCII, and raw bytes behind it, compressed.

    Args:
        text: without the byte 0.
        raw: may be empty.
        level: of zlib.
    """
    pack = zlib.compressobj(level, wbits=-15, zdict=WORDS)
    data = pack.compress(text.encode("ascii"))
    if raw:  # in a block of its own, since bytes and text have other statistics
        data += pack.flush(zlib.Z_PARTIAL_FLUSH) + pack.compress(b"\0" + raw)
    return data + pack.flush()


def unpack_text(packed: memoryview, description: Description | None, *, most: int) -> str:
    """Undo `pack_text`; the sender is not trusted.

    Args:
        packed: the bytes, with less than 8 zeros behind them.
        description: that the header refers to; None for none.
        most: characters that the text may have.

    Raises:
        PayloadError: damaged, longer than allowed, or not ASCII.
    """
    text, raw = inflate_text(packed, most=most)
    plain = _with_raw(text, raw, most)
    if description is not None:
        plain = description.expand(plain, most=most)
    return plain


def inflate_text(packed: memoryview, *, most: int) -> tuple[str, bytes]:
    """Undo `deflate_text`; the sender is not trusted.

    Args:
        packed: as for `unpack_text`.
        most: bytes of text and raw bytes together.

    Raises:
        PayloadError: damaged, longer than allowed, or not ASCII.
    """
    text, _, raw = _inflated(packed, most).partition(b"\0")
    if not text.isascii():
        raise PayloadError("the payload's header is not ASCII")
    return text.decode("ascii"), raw


def _inflated(packed: memoryview, most: int) -> bytes:
    unpack = zlib.decompressobj(wbits=-15, zdict=WORDS)
    try:
        plain = unpack.decompress(packed, most + 1)
    except zlib.error as error:
        raise PayloadError(f"the payload's header cannot be decompressed: {error}") from error
    if len(plain) > most:
        raise PayloadError(
            f"the payload's header is longer than the {most} characters that are read"
        )
    rest = unpack.unused_data
    if not unpack.eof or len(rest) > 7 or any(rest):
        raise PayloadError("the payload's header does not end with its compressed text")
    return plain


def _with_raw(text: str, raw: bytes, most: int) -> str:
    """Return the text with hashes and numbers, which follow it as bytes, in their places.

    Raises:
        PayloadError: there are other bytes than the text refers to, or the result is too long.
    """
    marks = text.count("\x05") + text.count("\x07")
    if marks > _MOST_MARKS:
        raise PayloadError(
            f"the payload's header refers to raw bytes {marks} times, at most {_MOST_MARKS}"
        )
    sizes = [int(mark[1]) if mark[1] else _HASH_SIZE for mark in _MARK.finditer(text)]
    if sum(sizes) != len(raw) or len(text) + 2 * len(raw) > most:
        raise PayloadError(
            f"the payload's header has {len(raw)} raw bytes, and refers to {sum(sizes)}; its text "
            f"may have {most} characters"
        )
    place = 0

    def insert(mark: re.Match[str]) -> str:
        nonlocal place
        size = int(mark[1]) if mark[1] else _HASH_SIZE
        octets = raw[place : place + size]
        place += size
        return base64.b64encode(octets).decode("ascii") if mark[1] else octets.hex()

    return _MARK.sub(insert, text)


def _from_base64(text: str) -> bytes | None:
    """Return the bytes that this very text stands for; None if there are none."""
    try:
        octets = base64.b64decode(text, validate=True)
    except binascii.Error:
        return None
    return octets if base64.b64encode(octets).decode("ascii") == text else None
