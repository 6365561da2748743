"""Hostile bytes for every stage and preset that is registered, new ones included.

What is particular to a stage stands in its own test; here is what must hold for all of them.
"""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys

import pytest
import torch

from fedpara_plugins.codecs import PRESETS, decode_payload, encode_payload, parse_codec
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.plugins import stages
from fedpara_plugins.testing.hostile import damaged, every_codec, pack, parts, signed
from fedpara_plugins.testing.stage_contract import broken_notes

TENSORS = {
    "w": torch.linspace(-1, 1, 40).reshape(8, 5),
    "h": torch.linspace(0, 1, 6).half(),
    "n": torch.tensor(5),
    "m": torch.tensor([True, False]),
}
REFERENCE = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
LIMIT = sum(tensor.nbytes for tensor in TENSORS.values())
CODECS = every_codec(stages())
EXTREMES = (0, -1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63, 2**64, 2**70)

every = pytest.mark.parametrize("text", list(CODECS))
alone = pytest.mark.parametrize("text", [text for text in CODECS if text in {*PRESETS, *stages()}])


def payload(text, tensors=None, **options):
    return encode_payload(
        TENSORS if tensors is None else tensors, codec=CODECS[text], reference=REFERENCE, **options
    )


def decode(data, limit=LIMIT):
    return decode_payload(data, reference=REFERENCE, limit=limit)


def refused(data):
    with pytest.raises(PayloadError) as caught:
        decode(data)
    return str(caught.value)


def decoded_or_refused(data):
    try:
        tensors = decode(data).tensors
    except PayloadError as error:
        if "MemoryError" in str(error):
            raise AssertionError("only the want of memory stopped this") from error
        return False
    assert sum(tensor.nbytes for tensor in tensors.values()) <= LIMIT
    return True


def forged(data, header, table=None, body=None):
    outer, _, old_body = parts(data)
    table = outer if table is None else table
    table["__metadata__"] = {"fedpara": json.dumps(header, separators=(",", ":"))}
    return pack(table, old_body if body is None else body)


def integers(value, path=()):
    """The paths of all integers in a JSON value."""
    if type(value) is int:
        yield path
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from integers(inner, (*path, key))


def with_value(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_value(copy[path[0]], path[1:], new)
    return copy


def test_every_registered_stage_and_preset_is_tried():
    used = {stage.name for codec in CODECS.values() for stage in codec.stages}
    assert set(PRESETS) <= set(CODECS)
    assert set(stages()) == used, "a coder whose library is missing here is not tried"


@every
def test_the_payloads_are_sound_and_their_sizes_are_those_of_the_model(text):
    back = decode(payload(text)).tensors
    assert [(n, t.dtype, t.shape) for n, t in back.items()] == [
        (n, t.dtype, t.shape) for n, t in TENSORS.items()
    ]
    with pytest.raises(PayloadError, match="limit"):
        decode(payload(text), limit=LIMIT - 1)


@every
def test_truncation_at_every_length(text):
    data = payload(text)
    for length in range(len(data)):
        refused(data[:length])
        refused(signed(data[:length]))


@every
def test_truncated_bodies_whose_table_says_so(text):
    """The table is made right again too, so that the stage itself must see what is missing."""
    data = payload(text)
    table, header, body = parts(data)
    for name in [name for name in table if name != "__metadata__"]:
        entry = table[name]
        start, stop = entry["data_offsets"]
        if stop != len(body) or len(entry["shape"]) != 1 or entry["dtype"] != "U8":
            continue
        for length in range(stop - start):
            short = {**entry, "shape": [length], "data_offsets": [start, start + length]}
            refused(forged(data, header, {**table, name: short}, body[: start + length]))


@alone
def test_every_flipped_bit_of_the_header_is_refused_or_harmless(text):
    data = payload(text)
    end = 8 + int.from_bytes(data[:8], "little")
    survivors = 0
    for place in range(8 * end):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        survivors += decoded_or_refused(signed(bytes(flipped)))
    assert survivors < 8 * end / 2


@every
def test_flipped_bits_of_the_body_are_refused_or_harmless(text):
    data = payload(text)
    end = 8 + int.from_bytes(data[:8], "little")
    for place in range(8 * end, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        refused(bytes(flipped))  # an accident
        decoded_or_refused(signed(bytes(flipped)))  # on purpose


@every
def test_random_damage_is_refused_or_harmless(text):
    draw = random.Random(text)
    tried = [decoded_or_refused(damaged(payload(text), draw)) for _ in range(300)]
    assert not all(tried)


@every
def test_notes_of_any_kind_are_refused_or_harmless(text):
    data = payload(text)
    _, header, _ = parts(data)
    for place, note in enumerate(header["notes"]):
        for broken in broken_notes(note):
            notes = [*header["notes"][:place], broken, *header["notes"][place + 1 :]]
            decoded_or_refused(forged(data, {**header, "notes": notes}))
        more = [*header["notes"][:place], {**note, "unheard of": 1}, *header["notes"][place + 1 :]]
        refused(forged(data, {**header, "notes": more}))


@every
def test_swapped_doubled_and_overlapping_tensors_are_refused_or_harmless(text):
    data = payload(text)
    table, header, body = parts(data)
    names = [name for name in table if name != "__metadata__"]
    first = names[0]
    refused(forged(data, header, {**table, "again": table[first]}))  # overlaps
    more = {"dtype": "U8", "shape": [3], "data_offsets": [len(body), len(body) + 3]}
    decoded_or_refused(forged(data, {**header, "order": None}, {**table, "~": more}, body + b"abc"))
    for name in names:
        left = {other: entry for other, entry in table.items() if other != name}
        refused(forged(data, header, left))  # a gap
    if len(names) > 1:
        swapped = {**table, first: table[names[1]], names[1]: table[first]}
        decoded_or_refused(forged(data, header, swapped))


@every
def test_pickles_in_the_place_of_tensors_are_never_run(text):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    data = payload(text)
    table, header, body = parts(data)
    pickled = pickle.dumps(Bomb())
    same_size = (pickled * (len(body) // len(pickled) + 1))[: len(body)]
    decoded_or_refused(forged(data, header, table, same_size))


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_or_stay_so(text, value):
    tensors = {**TENSORS, "w": TENSORS["w"].clone()}
    tensors["w"][2, 3] = value
    try:
        data = payload(text, tensors)
    except PayloadError as error:
        said = str(error)
    else:
        said = "" if torch.isfinite(decode(data).tensors["w"][2, 3]) else "'w' arrived as it was"
    assert "'w'" in said


@every
def test_no_tensors_at_all(text):
    data = encode_payload({}, codec=CODECS[text], reference={})
    assert decode_payload(data, reference={}, limit=0).tensors == {}


# --- memory -------------------------------------------------------------------------------------


def bombs():
    """Payloads that declare, or unpack to, far more than the limit."""
    for text in CODECS:
        data = payload(text)
        table, header, _ = parts(data)
        entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
        for path in integers(header["notes"]):
            for extreme in EXTREMES:
                notes = with_value(header["notes"], path, extreme)
                yield text, forged(data, {**header, "notes": notes})
        for path in integers(entries):
            for extreme in EXTREMES:
                yield text, forged(data, header, with_value(entries, path, extreme))
    yield from compressed_bombs()


def compressed_bombs():
    zeros = {"w": torch.zeros(30_000_000, dtype=torch.int8)}
    for text, codec in CODECS.items():
        if codec.stages and codec.stages[-1].entropy and not codec.needs_reference:
            large = encode_payload(zeros, codec=parse_codec(codec.stages[-1].name))
            yield text, large
            _, header, _ = parts(large)
            notes = [{**header["notes"][0], "shapes": [[LIMIT]]}]
            yield text, forged(large, {**header, "notes": notes})


WATCH = """
import resource, sys, pickle
from pathlib import Path
import torch
torch.set_num_threads(1)
from fedpara_plugins.codecs import decode_payload
from fedpara_plugins.errors import PayloadError
cases, reference, limit, room = pickle.load(sys.stdin.buffer)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def attempt(data):
    try:
        decode_payload(data, reference=reference, limit=limit)
    except PayloadError as error:
        assert "MemoryError" not in str(error), error
for _, data in cases[:: len(cases) // 200]:  # lazy imports first
    attempt(data)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + room, size + room))
before = peak()
for text, data in cases:
    attempt(data)
    grown = peak() - before
    assert grown < room // 1024, (text, grown, data[:600])
print(len(cases), peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, sets RLIMIT_AS")
def test_declared_sizes_and_bombs_cost_no_memory_in_a_process_that_has_none():
    cases = list(bombs())
    assert len(cases) > 1000
    assert any(len(data) > 10_000 for _, data in cases), "no compressed bomb among them"
    room = 24 << 20  # less than one bomb unpacks to
    result = subprocess.run(
        [sys.executable, "-c", WATCH],
        input=pickle.dumps((cases, REFERENCE, LIMIT, room)),
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    assert result.stdout.split()[0] == str(len(cases)).encode()
