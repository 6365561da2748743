"""Stage ans: integer symbols at their entropy, and a second decoder that knows only the page."""

from __future__ import annotations

import base64
import struct
import tracemalloc
import zlib
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.entropy_ans import AnsStage
from fedpara_plugins.stages.rans import frequency_table, lanes_for, pack, unpack
from fedpara_plugins.testing.samples import same_bits
from fedpara_plugins.testing.stage_contract import StageContract

STAGE = AnsStage()
KINDS = {"I8": "b", "I16": "h", "I32": "i"}
SYMBOL_DTYPES = (torch.int8, torch.int16, torch.int32)


def by_the_page(stream, notes):
    """Symbols and all other bytes, in Python's integers, by the words of docs/payload.md."""
    shapes = dict(zip(notes["names"], notes["shapes"], strict=True))
    dtypes = {
        name: notes["dtypes"][int(digit, 36)]
        for name, digit in zip(notes["names"], notes["each"], strict=True)
    }
    coded = [n for n, side in zip(notes["names"], notes["coded"], strict=True) if side == "s"]
    count = sum(int(np.prod(shapes[name])) for name in coded)
    lowest, places, escapes, words = struct.unpack_from("<iIII", stream)
    if not count:
        return {}, zlib.decompress(stream[16:])
    lanes = 8
    while lanes < 4096 and lanes * 768 < count:
        lanes *= 2
    row = iter(struct.unpack_from(f"<{words}H", stream, 16))
    plain = zlib.decompress(stream[16 + 2 * words :])
    states = list(struct.unpack_from(f"<{lanes}I", plain))
    plain = plain[4 * lanes :]
    table = struct.unpack_from(f"<{places + 1}H", plain)
    starts = [0, *accumulate(table)]
    kind = KINDS[max((dtypes[name] for name in coded), key=list(KINDS).index)]
    escaped = iter(struct.unpack_from(f"<{escapes}{kind}", plain, 2 * len(table)))
    values = []
    for place in range(count):
        state = states[place % lanes]
        slot = state % 2**14
        symbol = max(s for s in range(places + 1) if starts[s] <= slot and table[s])
        state = table[symbol] * (state // 2**14) + slot - starts[symbol]
        states[place % lanes] = state if state >= 2**16 else state * 2**16 + next(row)
        values.append(next(escaped) if symbol == places else lowest + symbol)
    assert states == [2**16] * lanes
    assert list(row) == list(escaped) == []
    found = iter(values)
    split = {name: [next(found) for _ in range(int(np.prod(shapes[name])))] for name in coded}
    return split, plain[2 * len(table) + escapes * struct.calcsize(kind) :]


def encode(tensors):
    coded, notes = STAGE.encode(tensors, reference=None)
    return bytes(coded["stream"].numpy()), notes


def decode(stream, notes, *, limit=10**7):
    tensors = {"stream": torch.tensor(list(stream), dtype=torch.uint8)}
    return STAGE.decode(tensors, notes, reference=None, limit=limit)


def bell(count, width, *, seed=0, dtype=torch.int8):
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=draw) * width).round().to(dtype)


def entropy(symbols):
    share = torch.unique(symbols, return_counts=True)[1].double() / symbols.numel()
    return -(share * share.log2()).sum().item()


class TestAns(StageContract):
    stage = AnsStage()

    @pytest.mark.parametrize("width", [0.25, 0.5, 2, 14, 25])
    def test_symbols_come_within_a_fifteenth_of_a_bit_of_their_entropy(self, width):
        symbols = bell(300_000, width)
        stream, notes = encode({"x": symbols})
        bits = 8 * len(stream) / symbols.numel()
        assert entropy(symbols) < bits < entropy(symbols) + 1 / 15
        assert torch.equal(decode(stream, notes)["x"], symbols)

    def test_many_tensors_cost_what_one_does(self):
        symbols = bell(100_000, 0.5)
        whole, _ = encode({"x": symbols})
        parts, _ = encode({str(i): part for i, part in enumerate(symbols.split(1000))})
        assert whole == parts

    def test_a_tensor_unlike_the_others_does_not_spoil_the_table(self):
        many, other = bell(100_000, 0.5), bell(2_000, 40, seed=1)
        alone, _ = encode({"x": many})
        stream, notes = encode({"x": many, "y": other})
        assert notes["coded"] == "s-"
        assert len(stream) < len(alone) + other.numel()

    def test_untouched_parts_cost_next_to_nothing(self):
        stream, notes = encode({"x": torch.zeros(10**6, dtype=torch.int8)})
        assert len(stream) < 10**6 / 500
        assert not decode(stream, notes)["x"].any()

    def test_rare_and_distant_symbols_escape(self):
        symbols = bell(50_000, 1, dtype=torch.int32)
        symbols[::9000] = torch.tensor([2**31 - 1, -(2**31), 40_000, 1025, -1025, 700])
        stream, notes = encode({"x": symbols})
        assert notes["coded"] == "s"
        assert struct.unpack_from("<iIII", stream)[2] >= 5
        assert torch.equal(decode(stream, notes)["x"], symbols)
        assert 8 * len(stream) / symbols.numel() < entropy(symbols) + 0.1

    def test_many_symbols_that_occur_once_do_not_crowd_out_the_others(self):
        symbols = torch.cat([bell(300_000, 0.3, dtype=torch.int16), torch.arange(-1000, 1000)])
        symbols = symbols.to(torch.int16)
        stream, notes = encode({"x": symbols})
        assert struct.unpack_from("<iIII", stream)[1:3] < (10, 2000)
        assert torch.equal(decode(stream, notes)["x"], symbols)
        assert 8 * len(stream) / symbols.numel() < entropy(symbols) + 1 / 15

    def test_numbers_that_are_no_symbols_go_with_the_rest(self):
        indices = torch.randperm(70_000, generator=torch.Generator().manual_seed(0))[:9_000]
        stream, notes = encode({"places": indices.to(torch.int32), "x": bell(9_000, 1)})
        assert notes["coded"] == "-s"
        assert same_bits(decode(stream, notes), {"places": indices.int(), "x": bell(9_000, 1)})

    @pytest.mark.parametrize("dtype", SYMBOL_DTYPES)
    def test_a_decoder_in_plain_integers_reads_it(self, dtype):
        tensors = {
            "a": bell(3000, 3, dtype=dtype).reshape(50, 60),
            "f": torch.randn(7, generator=torch.Generator().manual_seed(2)),
            "b": bell(9_001, 20, seed=1, dtype=torch.int8),
            "none": torch.empty(0, 3, dtype=torch.int8),
        }
        tensors["a"][0, 0] = torch.iinfo(dtype).max
        stream, notes = encode(tensors)
        symbols, rest = by_the_page(stream, notes)
        assert symbols["a"] == tensors["a"].flatten().tolist()
        assert symbols["b"] == tensors["b"].tolist()
        assert rest == tensors["f"].numpy().tobytes()

    def test_golden_bytes(self):
        """Written once; every later version and every platform reads and writes the same."""
        stream, notes = encode(GOLDEN_TENSORS)
        assert decode(GOLDEN_STREAM, GOLDEN_NOTES).keys() == GOLDEN_TENSORS.keys()
        assert same_bits(decode(GOLDEN_STREAM, GOLDEN_NOTES), GOLDEN_TENSORS)
        assert by_the_page(GOLDEN_STREAM, GOLDEN_NOTES)[0]["b"] == list(range(-6, 7))
        assert notes == GOLDEN_NOTES
        # What zlib makes of the table is its version's affair; all before it is integers.
        head = 16 + 2 * struct.unpack_from("<iIII", stream)[3]
        assert stream[:head] == GOLDEN_STREAM[:head]
        assert zlib.decompress(stream[head:]) == zlib.decompress(GOLDEN_STREAM[head:])


class TestHostileStreams:
    def test_every_truncation_is_refused(self):
        stream, notes = encode({"x": bell(500, 2), "f": torch.ones(3)})
        for length in range(len(stream)):
            with pytest.raises(PayloadError):
                decode(stream[:length], notes)
        with pytest.raises(PayloadError):
            decode(stream + b"\x00", notes)

    def test_every_flipped_bit_is_refused_or_decoded(self):
        symbols = bell(400, 2)
        symbols[7] = 120
        stream, notes = encode({"x": symbols, "f": torch.ones(3)})
        refused = 0
        for place in range(8 * len(stream)):
            damaged = bytearray(stream)
            damaged[place // 8] ^= 1 << place % 8
            try:
                back = decode(damaged, notes, limit=412)
            except PayloadError:
                refused += 1
            else:
                assert (back["x"].shape, back["f"].shape) == ((400,), (3,))
        # What is left are flips of the lowest symbol: there the checksum of the payload is needed.
        assert refused > 0.9 * 8 * len(stream)

    @settings(max_examples=300)
    @given(st.data())
    def test_any_head_table_and_words_are_refused_or_decoded(self, data):
        small = st.integers(0, 40)
        count = data.draw(small)
        table = data.draw(
            st.lists(st.sampled_from([0, 1, 2**13, 2**14, 2**16 - 1, 2**14 - 1]), max_size=5)
        )
        head = struct.pack(
            "<iIII",
            data.draw(st.sampled_from([0, -3, -1024, 1023, -(2**31), 2**31 - 1])),
            data.draw(st.sampled_from([0, 1, 2, len(table), max(0, len(table) - 1), 2**32 - 1])),
            data.draw(st.sampled_from([0, 1, count, count + 1, 2**32 - 1])),
            data.draw(st.sampled_from([0, 1, 2, 2**32 - 1])),
        )
        states = struct.pack(
            "<8I", *data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=8))
        )
        tail = struct.pack(f"<{len(table)}H", *table) + data.draw(st.binary(max_size=8))
        notes = {
            **{"names": ["x"], "shapes": [[count]], "each": "0", "coded": "s"},
            "dtypes": [data.draw(st.sampled_from(list(KINDS)))],
        }
        stream = head + data.draw(st.binary(max_size=4)) + zlib.compress(states + tail)
        try:
            back = decode(stream, notes, limit=4 * count)
        except PayloadError:
            return
        assert back["x"].shape == (count,)

    def test_a_table_that_does_not_sum_to_the_total_is_refused(self):
        for table in ([2**14, 1], [2**13, 2**13 - 1], [0, 0], [2**14 - 1, 2]):
            with pytest.raises(PayloadError, match="sum to"):
                decode(forged(table=table), symbol_notes(4))

    def test_a_state_below_the_least_is_refused(self):
        with pytest.raises(PayloadError, match="states of at least"):
            decode(forged(state=2**16 - 1), symbol_notes(4))

    def test_escapes_that_do_not_come_are_refused(self):
        with pytest.raises(PayloadError, match="0 symbols escape, and 1 values"):
            decode(forged(escaped=b"\x05"), symbol_notes(4))
        with pytest.raises(PayloadError, match="4 symbols of tensor 'x' escape, and 0 values"):
            decode(forged(table=[0, 2**14]), symbol_notes(4))

    def test_symbols_beyond_the_dtype_are_refused(self):
        with pytest.raises(PayloadError, match=r"does not fit torch\.int8"):
            decode(forged(lowest=128), symbol_notes(4))
        notes = {**symbol_notes(4), "dtypes": ["I16"]}
        assert decode(forged(lowest=128), notes)["x"].tolist() == [128] * 4

    def test_millions_of_values_in_no_bits_take_no_more_than_the_limit(self):
        """The cheapest hostile stream: a table of one symbol, so that the words run for ever."""
        count = 4_000_000
        stream = forged(lanes=lanes_for(count))
        assert not decode(stream, symbol_notes(count), limit=count)["x"].any()
        tracemalloc.start()
        try:
            with pytest.raises(PayloadError, match="limit"):
                decode(stream, symbol_notes(10**12), limit=count)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 1_000_000

    @pytest.mark.parametrize("dtype", ["F32", "U8", "I64", "BOOL"])
    def test_other_dtypes_are_never_symbols(self, dtype):
        with pytest.raises(PayloadError, match="cannot hold symbols"):
            decode(forged(), {**symbol_notes(4), "dtypes": [dtype]})

    @settings(max_examples=200)
    @given(st.binary(max_size=120), st.integers(0, 60), st.sampled_from("s-"))
    def test_any_bytes_are_refused_or_decoded(self, stream, count, side):
        try:
            back = decode(stream, {**symbol_notes(count), "coded": side}, limit=count)
        except PayloadError:
            return
        assert back["x"].shape == (count,)


def symbol_notes(count):
    return {"names": ["x"], "shapes": [[count]], "dtypes": ["I8"], "each": "0", "coded": "s"}


def forged(*, lowest=0, table=(2**14, 0), state=2**16, escaped=b"", lanes=8):
    """A stream of one symbol over and over; whatever else is asked for."""
    head = struct.pack("<iIII", lowest, len(table) - 1, len(escaped), 0)
    packed = struct.pack(f"<{len(table)}H", *table) + escaped
    return head + zlib.compress(struct.pack(f"<{lanes}I", *[state] * lanes) + packed)


class TestCoder:
    @settings(max_examples=200)
    @given(
        st.lists(st.integers(0, 400), min_size=1, max_size=60).filter(any),
        st.integers(0, 300),
        st.integers(1, 20),
        st.randoms(use_true_random=False),
    )
    def test_any_symbols_of_any_table_come_back(self, counts, length, lanes, chance):
        table = frequency_table(np.array(counts))
        assert table.sum() == 2**14
        assert ((table > 0) == (np.array(counts) > 0)).all()
        used = np.flatnonzero(counts)
        places = np.array([chance.choice(used) for _ in range(length)], dtype=np.int16)
        states, words = pack(places, np.arange(len(table)), table, lanes)
        names = np.arange(len(table), dtype=np.int16)
        parts = [part.copy() for part in unpack(states, words, table, names, length)]
        assert np.concatenate([*parts, places[:0]]).tolist() == places.tolist()

    def test_frequencies_follow_the_counts(self):
        table = frequency_table(np.array([1, 0, 10**6, 3 * 10**6]))
        assert table[:2].tolist() == [1, 0]
        assert abs(table[3] / table[2] - 3) < 0.01

    def test_lanes_bound_the_number_of_steps(self):
        assert [lanes_for(n) for n in (1, 6_144, 6_145, 1_556_000)] == [8, 8, 16, 2048]
        assert lanes_for(10**9) == 4096


GOLDEN_TENSORS = {
    "a": (torch.arange(-300, 300) ** 3 // 3_000_000).to(torch.int16).reshape(20, 30),
    "b": torch.arange(-6, 7, dtype=torch.int8),
    "c": torch.tensor([0.5, -2.0]),
}
GOLDEN_TENSORS["a"][3, 4] = -30_000
GOLDEN_NOTES = {
    "names": ["a", "b", "c"],
    "shapes": [[20, 30], [13], [2]],
    "dtypes": ["I16", "I8", "F32"],
    "each": "012",
    "coded": "ss-",
}
GOLDEN_STREAM = base64.b64decode(
    "9////xIAAAABAAAAgwAAADXBNcFOwJpBVYGUQgjDCMMHA4HDR8NBRWlFpIULhN6EnMVVBXsGC0echokJXslECOsI9sgr"
    "CX5L4Urqy/0JiMp3zBCKBMpBzlKPNA6GTrWPNNDCTX6PTB3qUb9c3tEgWSFZ3JsWXmpe/Rsd1JHWn56yXUGXMhcs07Ma"
    "b9G13byWPBuf1xxVeCW0qziu/exqYklg22lnacgtS2fdZ3tjEuOEoksmpqoh77gxqHIq8Jswk/FObx3xUzW6NQq0VrSn"
    "dKd0onNTcw+3iXbcdqY2hjaGNmQ3/Df8OGR5pTkf+R05KDlI+2x6KrxbPWj8CLwSvY09m/0efgB/UL/pfr5/wD6kv8U/"
    "M794AQFQAK//OYBo3XVAAQB1QAEAscABAP4AZz8mQEsC9cCjM3qALgZBAVwBXAHGAfwBMQLRAvcDIA9DD/cD7AIxAvwB"
    "xgF2AVwBJgEbANCKAAAAPwAAAMAIFhd8"
)
