"""Errors about what strangers sent: their text fits a line of a log."""

import json
import pickle

import pytest

from fedpara_plugins import ModelSpec
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.errors import LONGEST_TEXT, FedParaError, MismatchError, PayloadError
from fedpara_plugins.ledger import read_lines
from fedpara_plugins.references import LostReferenceError
from fedpara_plugins.testing.hostile import check_refusal, pack, parts

HOSTILE = "\x1b[31mred\r\nlog: all is well\x00\u202e"


def test_control_characters_are_spelled_and_the_rest_stays():
    error = PayloadError(f"tensor {HOSTILE}, é 日")
    assert str(error) == r"tensor \x1b[31mred\r\nlog: all is well\x00\u202e, é 日"
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("kind", [PayloadError, MismatchError])
def test_long_texts_lose_their_middle(kind):
    text = str(kind("start " + "x" * 10**6 + " end"))
    assert len(text) == LONGEST_TEXT
    assert text.startswith("start x")
    assert text.endswith("x end")


def test_errors_survive_pickling_as_workers_do_it():
    for error in (PayloadError("a"), LostReferenceError("b", ("c",))):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


@pytest.mark.parametrize("field", ["codec", "plugin", "reference"])
def test_what_a_header_says_writes_no_line_of_its_own(field):
    table, header, body = parts(encode_payload({}, codec=parse_codec("delta+zlib"), reference={}))
    header[field] = HOSTILE
    header["version"] = 2 if field == "plugin" else 1
    table["__metadata__"]["fedpara"] = json.dumps(header, separators=(",", ":"))
    with pytest.raises(MismatchError) as caught:
        decode_payload(pack(table, body), reference={}, limit=100)
    check_refusal(caught.value)
    assert "all is well" in str(caught.value)


def test_a_description_with_tens_of_thousands_of_private_names_is_read_at_once():
    """Inserted one by one they took minutes; here is no clock, only a row of 300,000."""
    data = {"weights": [], "seed": 0, "private": [[2 * i, f"p{i}"] for i in range(300_000)]}
    shared = tuple(f"s{i}" for i in range(300_000))
    with pytest.raises(PayloadError, match="fingerprint"):
        ModelSpec.from_json(data, shared)
    del data["private"][3:]
    keys = ("p0", "s0", "p1", "s1", "p2", *shared[2:])
    fingerprint = ModelSpec(weights={}, keys=keys, seed=0).fingerprint
    assert ModelSpec.from_json({**data, "fingerprint": fingerprint}, shared).keys == keys


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"line": HOSTILE}),
        json.dumps({HOSTILE: 1}),
        json.dumps(
            {"line": "evaluation", "round": HOSTILE, "source": "", "metric": "", "value": 0}
        ),
        json.dumps({"line": ["x" * 10**5]}),
    ],
)
def test_what_a_ledger_says_writes_no_line_of_its_own(tmp_path, line):
    path = tmp_path / "run.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(FedParaError, match=r"run\.jsonl, line 1") as caught:
        list(read_lines(path))
    check_refusal(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x" * 4000, "a text of 4000"),
        ("a\nb", "more than a line"),
        ("stage 'x' failed to decode: KeyError()", "wrong reason"),
        ("bad alloc: MemoryError", "wrong reason"),
    ],
)
def test_the_check_sees_what_it_is_for(text, said):
    with pytest.raises(AssertionError, match=said):
        check_refusal(FedParaError(text))
