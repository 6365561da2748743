# ruff: noqa: D102  (a test's name is its docstring)
"""The contract of codec stages, as a pytest class to inherit.

Example::

    class TestMyStage(StageContract):
        stage = MyStage()

        def error_bound(self, tensor, reference):   # only if the stage is not lossless
            return tensor.abs() * 0.01
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fedpara_plugins.errors import PayloadError
from fedpara_plugins.stages.stage import REAL_DTYPES, Notes, Stage, Tensors
from fedpara_plugins.testing.samples import SAMPLE_NAMES, finite_sample, nearby, same_bits

__all__ = ["StageContract", "broken_notes"]

AMPLE = 10**6

every_sample = pytest.mark.parametrize("sample", SAMPLE_NAMES)


class StageContract:
    """Tests of a stage. Inherit, set ``stage``, and override `error_bound` for a lossy stage.

    Attributes:
        stage: under test.
    """

    stage: Stage

    def error_bound(
        self, tensor: torch.Tensor, reference: torch.Tensor | None
    ) -> torch.Tensor | float:
        """Return the largest allowed |decoded - sent| for each value; called for lossy stages.

        Args:
            tensor: the tensor that was sent, as float64.
            reference: the reference's tensor as float64; None if the stage uses no reference.
        """
        raise NotImplementedError(f"{self.stage.name} is lossy: state its error_bound")

    def sample(self, name: str) -> Tensors:
        """Return the tensors of a sample; override if a stage refuses some of them by intent."""
        return finite_sample(name)

    def encoded(self, sample: str) -> tuple[Tensors, Tensors | None, Tensors, Notes]:
        """Return a sample, its reference, and the stage's tensors and notes for them."""
        tensors = self.sample(sample)
        reference = nearby(tensors) if self.stage.needs_reference else None
        coded, notes = self.stage.encode(tensors, reference=reference)
        return tensors, reference, coded, notes

    @every_sample
    def test_names_order_dtypes_and_shapes_come_back(self, sample: str) -> None:
        tensors, reference, coded, notes = self.encoded(sample)
        back = self.stage.decode(coded, notes, reference=reference, limit=AMPLE)
        assert list(back) == list(tensors)
        for name, tensor in tensors.items():
            assert (back[name].shape, back[name].dtype) == (tensor.shape, tensor.dtype), name

    @every_sample
    def test_values_come_back_within_the_bound(self, sample: str) -> None:
        tensors, reference, coded, notes = self.encoded(sample)
        back = self.stage.decode(coded, notes, reference=reference, limit=AMPLE)
        if self.stage.lossless:
            assert same_bits(back, tensors)
            return
        for name, tensor in tensors.items():
            if tensor.dtype not in REAL_DTYPES or tensor.numel() == 0 or tensor.ndim == 0:
                assert same_bits({name: back[name]}, {name: tensor})
                continue
            other = None if reference is None else reference[name].double()
            error = (back[name].double() - tensor.double()).abs()
            assert (error <= self.error_bound(tensor.double(), other)).all(), name

    @every_sample
    def test_inputs_stay_as_they_were(self, sample: str) -> None:
        tensors, reference, coded, notes = self.encoded(sample)
        assert same_bits(tensors, self.sample(sample))
        before = copy.deepcopy((coded, notes))
        self.stage.decode(coded, notes, reference=reference, limit=AMPLE)
        assert same_bits(coded, before[0])
        assert notes == before[1]
        if reference is not None:
            assert same_bits(reference, nearby(tensors))

    def test_the_stage_keeps_no_state(self) -> None:
        first = {sample: self.encoded(sample)[2:] for sample in SAMPLE_NAMES}
        for sample in reversed(SAMPLE_NAMES):
            coded, notes = self.encoded(sample)[2:]
            assert same_bits(coded, first[sample][0])
            assert notes == first[sample][1]

    @every_sample
    def test_notes_are_json(self, sample: str) -> None:
        notes = self.encoded(sample)[3]
        assert json.loads(json.dumps(notes, allow_nan=False)) == notes

    @pytest.mark.parametrize("sample", [name for name in SAMPLE_NAMES if name != "nothing"])
    def test_more_bytes_than_the_limit_are_refused(self, sample: str) -> None:
        tensors, reference, coded, notes = self.encoded(sample)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self.stage.decode(coded, notes, reference=reference, limit=size)
        with pytest.raises(PayloadError, match="limit"):
            self.stage.decode(coded, notes, reference=reference, limit=size - 1)

    def test_the_reference_is_required_where_it_is_needed(self) -> None:
        tensors, _, coded, notes = self.encoded("plain")
        if not self.stage.needs_reference:
            back = self.stage.decode(coded, notes, reference=None, limit=AMPLE)
            with_one = self.stage.decode(coded, notes, reference=nearby(tensors), limit=AMPLE)
            assert same_bits(back, with_one)
            return
        with pytest.raises(PayloadError, match="reference"):
            self.stage.encode(tensors, reference=None)
        with pytest.raises(PayloadError, match="reference"):
            self.stage.decode(coded, notes, reference=None, limit=AMPLE)

    @every_sample
    def test_broken_notes_raise_nothing_but_payload_error(self, sample: str) -> None:
        tensors, reference, coded, notes = self.encoded(sample)
        size = sum(tensor.nbytes for tensor in tensors.values())
        for broken in broken_notes(notes):
            self.decode_or_refuse(coded, broken, reference, size)
        with pytest.raises(PayloadError):
            self.stage.decode(coded, {**notes, "unheard of": 1}, reference=reference, limit=AMPLE)

    @every_sample
    def test_wrong_tensors_raise_nothing_but_payload_error(self, sample: str) -> None:
        tensors, reference, coded, notes = self.encoded(sample)
        size = sum(tensor.nbytes for tensor in tensors.values())
        for wrong in _wrong_tensors(coded):
            self.decode_or_refuse(wrong, notes, reference, size)

    def decode_or_refuse(
        self, coded: Tensors, notes: Notes, reference: Tensors | None, limit: int
    ) -> None:
        """Decode, and check that the result is a `PayloadError` or tensors within the limit."""
        try:
            back = self.stage.decode(coded, notes, reference=reference, limit=limit)
        except PayloadError:
            return
        assert sum(tensor.nbytes for tensor in back.values()) <= limit


_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**70, 1.5, 1e300, "", "x", "é", "0" * 9, "zz--"),
    *([], [None], [-1], [2**70], [[]], [[2**70]], [[2**40, 2**40, 0]], [[True]], [["x"]]),
    *(["F32"], ["F32"] * 40, ["x", "x"], {}, {"x": []}, [[1] * 2000]),
)


def broken_notes(notes: Notes) -> Iterator[Notes]:
    """Yield the notes with a field missing, replaced, shortened, doubled or damaged inside."""
    for key, value in notes.items():
        yield {other: kept for other, kept in notes.items() if other != key}
        for strange in _STRANGE:
            yield {**notes, key: strange}
        if isinstance(value, str | list):
            twice: Any = value * 2
            yield {**notes, key: value[:-1]}
            yield {**notes, key: twice}
            yield {**notes, key: value[::-1]}
        if isinstance(value, list):
            for strange in _STRANGE:
                yield {**notes, key: [strange, *value[1:]]}


def _wrong_tensors(tensors: Tensors) -> Iterator[Tensors]:
    yield {}
    yield {**tensors, "one too many": torch.ones(2)}
    for name, tensor in tensors.items():
        yield {other: kept for other, kept in tensors.items() if other != name}
        wrong = (
            tensor.reshape(-1)[:0],
            tensor.reshape(-1)[:1],
            tensor.unsqueeze(0),
            torch.full((3,), -128, dtype=torch.int8),
            torch.tensor(float("nan")),
            torch.ones(4, dtype=torch.uint8),
            torch.ones(2, 2, dtype=torch.complex64),
        )
        for other in wrong:
            yield {**tensors, name: other}
