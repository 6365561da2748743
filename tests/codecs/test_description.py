"""Descriptions: what they say, that they are undone exactly, and that they stay bounded."""

from __future__ import annotations

import zlib

import pytest
import torch

from fedpara_plugins.codecs.description import (
    LONGEST_TEXT,
    NO_DESCRIPTION,
    Description,
    HeaderForm,
    LostDescriptionError,
    held_description,
)
from fedpara_plugins.errors import MismatchError, PayloadError

TENSORS = {
    "a.weight": torch.zeros(4, 3),
    "half": torch.zeros(2).bfloat16(),
    "steps": torch.tensor(7),
    "mask": torch.tensor([True]),
}
KNOWN = Description.of({"seed": 3}, TENSORS)


def test_a_description_is_four_lines_of_json():
    assert KNOWN.text.split("\n") == [
        '{"seed":3}',
        '"a.weight","half","steps","mask"',
        "[4,3],[2],[],[1]",
        "[4,4,3],[2,2],[],[1]",
    ]


@pytest.mark.parametrize(
    "other",
    [
        Description.of({"seed": 4}, TENSORS),
        Description.of(None, TENSORS),
        Description.of({"seed": 3}, dict(reversed(TENSORS.items()))),
        Description.of({"seed": 3}, {**TENSORS, "a.weight": torch.zeros(3, 4)}),
        Description.of({"seed": 3}, {**TENSORS, "half": torch.zeros(2)}),
    ],
)
def test_other_models_names_and_shapes_have_other_hashes(other):
    assert len(KNOWN.digest) == 32
    assert other.digest != KNOWN.digest


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"model":{"seed":3},"names":["a.weight","half","steps","mask","more"]}',
        '{"shapes":[[4,3],[2],[],[1],[9]]},{"shapes":[[4,4,3],[2,2],[],[1]]}',
        KNOWN.text.replace("\n", "") * 3,
    ],
)
def test_what_is_shortened_comes_back(text):
    short = KNOWN.shorten(text)
    assert KNOWN.expand(short, most=len(text)) == text
    if text.strip("[]"):
        assert len(short) < len(text)


def test_nothing_is_expanded_beyond_the_bound():
    text = "\x01" * 1000
    whole = KNOWN.expand(text, most=10_000)
    assert len(whole) == 10_000
    with pytest.raises(PayloadError, match="would have 10000 characters, at most 9999"):
        KNOWN.expand(text, most=9_999)


def test_a_stored_description_comes_back_or_counts_as_not_held():
    data = KNOWN.to_bytes()
    assert Description.from_bytes(data) == KNOWN
    assert Description.from_bytes(b"") is None
    assert Description.from_bytes(b"?" + data) is None
    for text in (
        b"one line",
        b"\xff\n\n\n",
        b"\n" * 4,
        bytes(LONGEST_TEXT + 1),
        b"\n\n\n" + b"x" * LONGEST_TEXT,
    ):
        assert Description.from_bytes(zlib.compress(text)) is None


def test_a_description_that_is_not_held_is_asked_for_by_name():
    assert held_description(NO_DESCRIPTION, None) is None
    assert held_description(KNOWN.digest, {KNOWN.digest: KNOWN}) is KNOWN
    for held in (None, {}, {"1" * 32: KNOWN}):
        with pytest.raises(LostDescriptionError, match=f"description {KNOWN.digest}, this side"):
            held_description(KNOWN.digest, held)
    assert issubclass(LostDescriptionError, MismatchError)


def test_a_description_that_no_receiver_would_keep_is_not_referred_to():
    long = Description(("x" * LONGEST_TEXT, "", "", ""))
    assert HeaderForm(long).digest == NO_DESCRIPTION
    assert HeaderForm(long).usable is None
    assert HeaderForm(KNOWN).digest == KNOWN.digest
