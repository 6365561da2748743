"""Decoding takes one and a half times the limit at most, whatever a stage is told to decode."""

import json
import os
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch

from fedpara_plugins.codecs import HeaderForm, encode_payload, parse_codec
from fedpara_plugins.stages.rans import lanes_for
from fedpara_plugins.testing.hostile import pack

COUNT = 4 * 2**20
SLACK = 10 * 2**20
HALVES = torch.randn(2, COUNT // 2, generator=torch.Generator().manual_seed(0)).half()
REFERENCE = {"w": (torch.arange(COUNT).reshape(2, -1) % 64 / 64).half()}


def forged(codec, note, tensors, more=""):
    """A signed payload with a note or several, its tensors as (name, dtype, shape, bytes)."""
    fields = {"plugin": "x", "codec": codec, "reference": None, "model": None, "extra": None}
    order = sorted(range(len(tensors)), key=lambda i: tensors[i][0])
    places = [order.index(i) for i in range(len(tensors))]
    notes = note if isinstance(note, list) else [note]
    header = {"crc32": "0" * 8, "version": 1, **fields, "order": places, "notes": notes}
    text = json.dumps(header, separators=(",", ":"))
    text = text.replace('"extra":null', f'"extra":{{"x":[{more}0]}}')
    table, body = {"__metadata__": {"fedpara": text}}, b""
    for name, dtype, shape, octets in tensors:
        ends = [len(body), len(body) + len(octets)]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        body += octets
    return pack(table, body)


def rows_of_one_value():
    """A step of four bytes for every symbol of one."""
    n = COUNT // 4
    note = {"dtypes": ["F16"], "each": "0", "scopes": "r", "block": 0, "steps": "", "far": 0}
    steps = np.full(n, 0.5, "<f4").tobytes()
    tensors = [("w", "I8", [n, 1], bytes(n)), ("x", "F32", [n], steps)]
    return forged("quantise", note, tensors), 5 * n


def all_values_kept():
    """A position of one byte for every value of two."""
    n = COUNT // 2
    tensors = [("w", "F16", [1, n], b"\0\x3c" * n), ("x", "U8", [n], bytes(n))]
    return forged("topk", {"shapes": [[n + 1, 1]]}, tensors), 3 * n


def all_symbols_escape(n, wide):
    """Escaped values in the widest dtype: four bytes for each symbol of one, if there is both."""
    shapes, kinds = ([[n], [1]], ["I8", "I32"]) if wide else ([[n]], ["I8"])
    states = np.full(lanes_for(n + wide), 2**16, "<u4").tobytes()
    rest = zlib.compress(states + struct.pack("<H", 2**14) + bytes((4 if wide else 1) * (n + wide)))
    each = "01"[: len(shapes)]
    note = {"names": list("wx")[: len(shapes)], "shapes": shapes, "dtypes": kinds, "each": each}
    stream = struct.pack("<iIII", 0, 0, n + wide, 0) + rest
    note["coded"] = "s" * len(shapes)
    return forged("ans", note, [("stream", "U8", [len(stream)], stream)]), 2 * n


def all_values_kept_and_packed():
    """The same out of a stream: all values and positions take memory when the result does."""
    n = COUNT // 2
    body = zlib.compress(b"\0\x3c" * n + bytes(n), 1)
    layout = {"names": ["w", "x"], "shapes": [[1, n], [n]], "dtypes": ["F16", "U8"], "each": "01"}
    notes = [{"shapes": [[n + 1, 1]]}, layout]
    return forged("topk+zlib", notes, [("stream", "U8", [len(body)], body)]), 3 * n


def steps_beside_symbols():
    """As many bytes of steps as of symbols, beside values of twice a symbol's width."""
    n = COUNT
    note = {"dtypes": ["F16"], "each": "0", "scopes": "b", "block": 4, "steps": "", "far": 0}
    steps = np.full(n // 4, 0.5, "<f4").tobytes()
    layout = {"names": ["w", "x"], "shapes": [[n], [n // 4]], "dtypes": ["I8", "F32"], "each": "01"}
    body = zlib.compress(bytes(n) + steps, 1)
    return forged("quantise+zlib", [note, layout], [("stream", "U8", [len(body)], body)]), 2 * n


def objects_in_the_header():
    """Lists that take more than the tensors may."""
    return forged("none", [], [("w", "F16", [COUNT], bytes(2 * COUNT))], "[]," * 10**6), 2 * COUNT


def honest(codec, tensors=None, *, form=None):
    tensors = {"w": HALVES} if tensors is None else tensors
    data = encode_payload(tensors, codec=parse_codec(codec), reference=REFERENCE, form=form)
    return data, sum(tensor.nbytes for tensor in tensors.values())


CASES = (
    {
        "rows of one value": rows_of_one_value,
        "all values kept": all_values_kept,
        "all values kept, packed": all_values_kept_and_packed,
        "steps beside symbols": steps_beside_symbols,
        "objects in the header, refused": objects_in_the_header,
        "all symbols escape": lambda: all_symbols_escape(COUNT, False),
        "all symbols escape, one is wide, refused": lambda: all_symbols_escape(COUNT, True),
        "steps on a grid": lambda: honest("grid+zlib", {"w": REFERENCE["w"] + 0.25}),
        "floats of eight bytes": lambda: honest(
            "planes+zlib", {"w": torch.ones(COUNT // 2).double()}
        ),
    }
    | {
        codec: lambda codec=codec: honest(codec)
        for codec in (
            "lossless",
            "int8",
            "balanced",
            "small",
            "quantise:bits=4,scope=row+ans",
            "cast",
        )
    }
    | {
        f"{codec}, version 2": lambda codec=codec: honest(codec, form=HeaderForm())
        for codec in ("none", "lossless", "small", "cast")
    }
)

WATCH = """
import pickle, sys
import torch
torch.set_num_threads(1)
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.errors import PayloadError
cases, reference = pickle.load(sys.stdin.buffer)
def status(key):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(key))
zeros = {"w": torch.zeros(9, 4)}
for codec in ("small", "lossless", "topk:share=0.1", "quantise:scope=row+ans"):  # lazy imports
    packed = encode_payload({"w": torch.rand(9, 4)}, codec=parse_codec(codec), reference=zeros)
    decode_payload(packed, limit=10**4, reference=zeros)
for name, (data, limit) in cases.items():
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    try:
        decode_payload(data, limit=limit, reference=reference)
        outcome = "decoded"
    except PayloadError as error:
        outcome = "refused"
    print(outcome, (status("VmHWM") - before) / (1.5 * limit + SLACK), name)
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"),
    reason="reads a process's peak memory from /proc, which Linux alone has",
)
def test_decoding_stays_below_one_and_a_half_times_the_limit():
    cases = {name: make() for name, make in CASES.items()}
    # glibc would keep what was freed, and the next case would find it for nothing.
    result = subprocess.run(
        [sys.executable, "-c", WATCH.replace("SLACK", str(SLACK))],
        input=pickle.dumps((cases, REFERENCE)),
        capture_output=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    found = [line.split(maxsplit=2) for line in result.stdout.decode().splitlines()]
    assert [name for *_, name in found] == list(CASES)
    for outcome, times, name in found:
        assert outcome == ("refused" if name.endswith("refused") else "decoded"), name
        assert float(times) < 1, (name, times)
