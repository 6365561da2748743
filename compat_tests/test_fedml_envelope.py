"""The bytes of a message: as docs/envelope.md says, and damaged in every way."""

from __future__ import annotations

import json
import logging
import random
import struct
import tracemalloc
import zlib
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpara_plugins import FedParaError, MismatchError, PayloadError
from fedpara_plugins.testing.hostile import check_refusal
from fedpara_plugins_fedml.messages.envelope import MAX_HEAD, MAX_PAYLOADS, Envelope, pack, unpack
from fedpara_plugins_fedml.messages.head import Head
from fedpara_plugins_fedml.messages.hostile import damaged
from harness.fedml.project import arguments, dataset, model

GOLDEN = (
    b"FPE1N\x00\x00\x00\x3c\xc1\xcb\x39"
    b'{"head":{"round":2,"task":{"bound":0.5}},"payloads":[["model",3],["other",0]]}abc'
)
"""Written out by hand, checksum and all."""


def by_the_page(data: bytes) -> tuple[Any, dict[str, bytes]]:
    """Decode a sound message from docs/envelope.md alone."""
    magic, size, checksum = data[:4], *struct.unpack("<II", data[4:12])
    text, rest = data[12 : 12 + size], data[12 + size :]
    assert (magic, zlib.crc32(text)) == (b"FPE1", checksum)
    words = json.loads(text)
    found = {}
    for name, count in words["payloads"]:
        found[name], rest = rest[:count], rest[count:]
    assert rest == b""
    return words["head"], found


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**50), 10**50)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
heads = st.dictionaries(st.text(max_size=8), values, max_size=5)
names = st.from_regex(r"[a-z][a-z0-9_]{0,20}", fullmatch=True)
contents = st.dictionaries(names, st.binary(max_size=60), max_size=6)


# Sound messages


def test_the_bytes_are_those_of_the_page() -> None:
    head, payloads = {"round": 2, "task": {"bound": 0.5}}, {"model": b"abc", "other": b""}
    assert pack(head, payloads) == GOLDEN
    assert unpack(GOLDEN) == Envelope(head, payloads)


@given(head=heads, payloads=contents)
def test_a_message_comes_back_as_it_was(head: dict[str, Any], payloads: dict[str, bytes]) -> None:
    data = pack(head, payloads)
    assert unpack(data) == Envelope(head, payloads)
    assert list(unpack(data).payloads) == list(payloads)
    assert by_the_page(data) == (head, payloads)
    assert unpack(memoryview(data)) == unpack(bytearray(data)) == unpack(data)


def test_a_head_comes_back_as_it_was() -> None:
    head = Head(round=2, examples=3.5, holds={"model": "ab"}, has={"model": ["x"]}, fresh=True)
    assert Head.from_json(unpack(pack(head.to_json(), {})).head) == head
    error = head.failed(RuntimeError("full\ndisk" + "x" * 5000), fatal=False)
    assert error.error.startswith("RuntimeError: full")
    assert len(error.error) < 1100
    with pytest.raises(FedParaError, match="could not train: RuntimeError"):
        error.raise_error("4")


# Damaged ones


@given(data=st.binary(max_size=80) | st.binary(max_size=80).map(lambda rest: b"FPE1" + rest))
def test_any_bytes_give_one_kind_of_error(data: bytes) -> None:
    with pytest.raises(PayloadError) as caught:
        unpack(data)
    check_refusal(caught.value)


@given(head=heads, payloads=contents, data=st.data())
def test_no_byte_of_the_head_changes_and_none_is_cut_or_added_unseen(
    head: dict[str, Any], payloads: dict[str, bytes], data: st.DataObject
) -> None:
    whole = pack(head, payloads)
    size = len(whole) - sum(map(len, payloads.values()))
    place, bits = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, 255))
    other = whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :]
    for wrong in (other, whole[: data.draw(st.integers(0, len(whole) - 1))], whole + b"!"):
        with pytest.raises(PayloadError):
            unpack(wrong)


@settings(max_examples=300)
@given(words=values | st.fixed_dictionaries({"head": values, "payloads": values}))
def test_any_json_in_the_place_of_the_head(words: Any) -> None:
    text = json.dumps(words).encode()
    data = struct.pack("<4sII", b"FPE1", len(text), zlib.crc32(text)) + text
    try:
        found = unpack(data)
    except PayloadError as error:
        check_refusal(error)
    else:
        assert words == {"head": dict(found.head), "payloads": []}


def test_damage_that_is_signed_again_gives_one_kind_of_error_or_something_sound() -> None:
    draw = random.Random(3)
    head = Head(round=1, examples=20.0, holds={"model": "ab"}, report={"kept": 1.0}).to_json()
    whole = pack(head, {"model": b"0123456789", "other": b"xyz"})
    sound = 0
    for _ in range(5000):
        data = damaged(damaged(whole, draw), draw)
        try:
            found = unpack(data)
            told = Head.from_json(found.head)
        except PayloadError as error:
            check_refusal(error)
            continue
        sound += 1
        assert unpack(pack(found.head, found.payloads)) == found
        assert Head.from_json(told.to_json()) == told
    assert 500 < sound < 4500  # both kinds were met


@pytest.mark.parametrize(
    "words",
    [
        '{"head":{},"payloads":[["a",1],["a",1]]}',
        '{"head":{},"payloads":[["a",-1],["b",3]]}',
        '{"head":{},"payloads":[["a",true],["b",1]]}',
        '{"head":{},"payloads":[["a",2.0]]}',
        '{"head":{},"payloads":[["a"]]}',
        '{"head":{},"payloads":["a2"]}',
        '{"head":{},"payloads":{"a2":0}}',
        '{"head":{},"payloads":[["A",2]]}',
        '{"head":{},"payloads":[["a/b",2]]}',
        '{"head":{},"payloads":[["\\ud800",2]]}',
        '{"head":{},"payloads":[["' + "a" * 65 + '",2]]}',
        '{"head":[],"payloads":[["a",2]]}',
        '{"head":{},"payloads":[["a",2]],"more":0}',
        '{"head":{},"head":{},"payloads":[["a",2]]}',
        '{"head":{}}',
        "[]",
        "[" * 100,
        '{"head":{"x":NaN},"payloads":[["a",2]]}',
        '{"head":{"x":1' + "0" * 100 + '},"payloads":[["a",2]]}',
    ],
)
def test_a_head_that_makes_no_sense_is_refused(words: str) -> None:
    def message(text: bytes) -> bytes:
        return struct.pack("<4sII", b"FPE1", len(text), zlib.crc32(text)) + text + b"12"

    assert unpack(message(b'{"head":{},"payloads":[["a",2]]}')).payloads == {"a": b"12"}
    with pytest.raises(PayloadError):
        unpack(message(words.encode()))


def test_bounds_of_a_head_and_of_the_number_of_payloads() -> None:
    most = {f"p{number}": b"" for number in range(MAX_PAYLOADS)}
    assert len(unpack(pack({}, most)).payloads) == MAX_PAYLOADS
    for head, payloads in (({}, {**most, "more": b""}), ({"text": "x" * MAX_HEAD}, {})):
        with pytest.raises(PayloadError, match="more than"):
            pack(head, payloads)
    with pytest.raises(PayloadError, match="invalid name of a payload 'A'"):
        pack({}, {"A": b""})
    with pytest.raises(PayloadError, match="not plain JSON"):
        pack({"value": float("nan")}, {})
    text = json.dumps({"head": {}, "payloads": [[f"p{n}", 0] for n in range(65)]}).encode()
    for data in (
        struct.pack("<4sII", b"FPE1", len(text), zlib.crc32(text)) + text,
        struct.pack("<4sII", b"FPE1", MAX_HEAD + 1, 0) + b" " * (MAX_HEAD + 1),
    ):
        with pytest.raises(PayloadError):
            unpack(data)


def test_memory_is_bounded_by_the_message() -> None:
    """The worst head there is, empty lists, takes some 80 bytes for each of its own."""
    for inner in ("[" + "[]," * 349_000 + "0]", "[" + '"",' * 349_000 + "0]"):
        text = b'{"head":{"x":' + inner.encode() + b'},"payloads":[]}'
        assert 2**20 - 2000 < len(text) <= MAX_HEAD
        data = struct.pack("<4sII", b"FPE1", len(text), zlib.crc32(text)) + text
        tracemalloc.start()
        unpack(data)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 80 * MAX_HEAD
    for count in (2**40, 10**99):
        text = json.dumps({"head": {}, "payloads": [["a", count]]}).encode()
        with pytest.raises(PayloadError, match="does not have the size in its head"):
            unpack(struct.pack("<4sII", b"FPE1", len(text), zlib.crc32(text)) + text)


def test_a_message_of_something_else_says_that_the_plugin_is_missing() -> None:
    with pytest.raises(MismatchError, match="runs without the plugin"):
        unpack({"weight": torch.ones(2)})
    with pytest.raises(MismatchError, match="begins with"):
        unpack(b"PK\x03\x04" + bytes(100))


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"round": "3"},
        {"round": True},
        {"round": 1, "purpose": "x" * MAX_HEAD},
        {"round": 1, "examples": "many"},
        {"round": 1, "holds": {"model": 3}},
        {"round": 1, "has": {"model": [3]}},
        {"round": 1, "has": {"model": "text"}},
        {"round": 1, "decoders": [1]},
        {"round": 1, "lost": 1},
        {"round": 1, "report": []},
    ],
)
def test_a_head_of_other_kinds_of_values_is_refused(words: dict[str, Any]) -> None:
    with pytest.raises(PayloadError):
        Head.from_json(words)


# What a damaged message does to the two halves


def halves(optimizer: str) -> Any:
    from fedpara_plugins_fedml import FedMLRunner

    keys = {"fedpara_method": "pfedpara", "fedpara_codec": "balanced", "comm_round": 99}
    keys |= {"federated_optimizer": optimizer, "fedpara_guard_collect": 0, "gmf": 0.5}
    return FedMLRunner(arguments(**keys), torch.device("cpu"), dataset(), model()).runner


def answer(run: Any, client: str, message: bytes) -> bytes:
    own = [run._dataset[place][int(client)] for place in (5, 6, 4)]
    data: bytes = run.clients.train(client, message, *own)
    return data


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("optimizer", ["FedAvg", "FedOpt", "SCAFFOLD", "FedDyn", "FedNova"])
def test_a_damaged_reply_costs_a_client_its_round_and_nobody_else_anything(optimizer: str) -> None:
    logging.disable(logging.CRITICAL)
    run, draw = halves(optimizer), random.Random(7)
    server, taken, refused = run.server, 0, 0
    for _ in range(12):
        server.begin(["0", "1"])
        replies = {client: answer(run, client, server.message(client)) for client in "01"}
        assert server.receive("0", replies["0"])
        for _ in range(40):
            data = damaged(replies["1"], draw)
            try:
                taken += server.receive("1", data)
            except FedParaError as error:
                refused += 1
                if not str(error).startswith("fedpara: client 1: "):  # what it says of itself
                    check_refusal(error)
        server.end()
        assert all(torch.isfinite(value).all() for value in server.state.values())
    logging.disable(logging.NOTSET)
    assert taken > 20
    assert refused > 200


@pytest.mark.parametrize("optimizer", ["SCAFFOLD", "FedDyn"])
def test_a_damaged_message_gives_a_reply_and_changes_nothing_that_is_kept(optimizer: str) -> None:
    logging.disable(logging.CRITICAL)
    run, draw = halves(optimizer), random.Random(8)
    server, failed = run.server, 0
    server.begin(["0"])
    server.receive("0", answer(run, "0", server.message("0")))
    server.end()
    server.begin(["0"])
    whole = server.message("0")
    storage = run.clients._storages.open("0")
    before = dict(storage.items())
    assert before
    for _ in range(150):
        reply = unpack(answer(run, "0", damaged(whole, draw)))
        head = Head.from_json(reply.head)
        if head.error or head.lost:
            failed += 1
            assert dict(run.clients._storages.open("0").items()) == before
        else:
            for key, value in before.items():
                storage[key] = value
            storage.commit()
            before = dict(storage.items())
    logging.disable(logging.NOTSET)
    assert failed > 50
