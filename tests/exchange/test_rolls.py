"""All records of a message in one payload: what it costs, who is sent it, what is lost."""

from __future__ import annotations

import base64

import pytest
import torch

from fedpara_plugins.codecs import peek_header
from fedpara_plugins.codecs.payload import open_payload
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.exchange import JOINT_RECORD, DownlinkEncoder, OwnModel, OwnModels, plain_spec
from fedpara_plugins.exchange.rolls import REMEMBERED, separated
from fedpara_plugins.references import LostReferenceError

OLD = ("zlib", "ans", "payload2")
FURTHER = 16
"""Bytes of each further record beside its values."""


def adapters(count):
    """Parts of a LoRA, no two of them alike."""
    draw = torch.Generator().manual_seed(0)
    return {
        f"part_{n}": {
            f"model.layers.{i}.attn.{'qkvo'[n % 4]}_proj.lora_{side}.weight": torch.randn(
                (8, 24 + n) if side == "A" else (24 + n, 8), generator=draw
            )
            for i in range(3 + n)
            for side in "AB"
        }
        for n in range(count)
    }


class Run:
    """Rounds of a server and a client that exchange several records."""

    def __init__(self, helpers, records, *, client=None, **options):
        self.helpers, self.client = helpers, client
        self.pair = helpers.Pair(method="none", **options)
        self.encoder = self.pair.encoder = DownlinkEncoder(self.pair.settings)
        self.states = records
        self.storage = self.pair.storage
        self.sent = self.answered = None
        self.put(records)

    def put(self, records):
        for name, state in records.items():
            self.encoder.put(name, state, plain_spec(state))

    def client_round(self):
        models = [
            OwnModel(plain_spec(state), sum(value.nbytes for value in state.values()))
            for state in self.states.values()
        ]
        return self.pair.round(own=OwnModels(self.pair.settings.config, models))

    def round(self, *records, answers=None):
        self.sent = self.encoder.encode_all("7", records or tuple(self.states))
        here = self.client_round()
        try:
            received = here.receive(self.sent)
        except LostReferenceError:
            self.encoder.note_refusal("7", here.known_hashes())
            raise
        names = received if answers is None else answers
        moved = {n: self.helpers.moved(received[n].user_tensors, seed=len(n)) for n in names}
        self.answered = here.encode(here.prepare_reply(moved))
        here.keep()
        self.stated = here.received_hashes
        reader = self.pair.reader(strict=False)
        self.rolls = dict(self.encoder.rolls)
        self.read = reader.read_all(self.answered)
        decoders = here.decoders if self.client is None else self.client
        self.encoder.acknowledge("7", {**reader.references, **self.stated}, decoders)
        self.states = {n: self.helpers.moved(s, seed=3) for n, s in self.states.items()}
        self.put(self.states)
        return self

    def apart(self, payloads):
        return separated(payloads, self.rolls, limit=None)

    def beside(self, payloads):
        """Bytes of a message beside streams, steps and scales."""
        total = sum(map(len, payloads.values()))
        for payload in self.apart(payloads).values():
            opened = open_payload(payload, limit=10**7, descriptions=self.encoder.descriptions)
            notes = opened.header.notes
            texts = [note.get(key, "") for note in notes for key in ("steps", "scales")]
            total -= opened.container.body.nbytes + sum(len(base64.b64decode(t)) for t in texts)
        return total


@pytest.mark.parametrize("codec", ["lossless", "int8", "balanced", "small", "delta+planes+zlib"])
@pytest.mark.parametrize("references", ["client", "grid"])
def test_later_messages_take_200_bytes_and_16_for_each_further_record(helpers, codec, references):
    sizes = {}
    for count in (1, 2, 5):
        run = Run(helpers, adapters(count), codec=codec, references=references)
        for _ in range(3):
            run.round()
        sizes[count] = (run.beside(run.sent), run.beside(run.answered))
        assert (JOINT_RECORD in run.sent, JOINT_RECORD in run.answered) == (count > 1, count > 1)
        assert not run.stated or (count, codec) == (1, "lossless")
    for one, two, five in zip(*sizes.values(), strict=True):
        assert one <= 119
        assert two <= one + FURTHER
        assert five <= one + 4 * FURTHER


def test_an_encoder_and_a_classifier(helpers):
    records = {
        "encoder": {f"{i}.{n}": torch.randn(16, 16 + i) for i in range(6) for n in "ab"},
        "classifier": {"weight": torch.randn(10, 16), "bias": torch.randn(10)},
    }
    run = Run(helpers, records, codec="small")
    for _ in range(3):
        run.round()
    alone = Run(helpers, {"encoder": records["encoder"]}, codec="small")
    for _ in range(3):
        alone.round()
    assert run.beside(run.sent) <= alone.beside(alone.sent) + FURTHER
    assert run.beside(run.answered) <= alone.beside(alone.answered) + FURTHER


@pytest.mark.parametrize("codec", ["none", "lossless", "small"])
def test_the_values_are_those_of_records_apart(helpers, codec, monkeypatch):
    joint = Run(helpers, adapters(3), codec=codec)
    apart = Run(helpers, adapters(3), codec=codec, client=OLD)
    for _ in range(4):
        joint.round()
        apart.round()
        assert list(joint.read) == list(apart.read)
        for name, record in joint.read.items():
            for key, value in record.shared.items():
                assert torch.equal(value, apart.read[name].shared[key])
    assert JOINT_RECORD in joint.sent
    assert JOINT_RECORD not in apart.sent


def test_an_older_server_is_answered_with_records_apart(helpers, monkeypatch):
    monkeypatch.setattr("fedpara_plugins.exchange.headers.readable", lambda: OLD)
    run = Run(helpers, adapters(2), codec="small", client=OLD)
    for _ in range(3):
        run.round()
        assert run.sent.keys() == run.answered.keys() == {"part_0", "part_1"}
    assert peek_header(run.sent["part_0"]).version == 2


def test_the_first_answer_is_joint_and_names_no_hash(helpers):
    run = Run(helpers, adapters(2), codec="small").round()
    assert run.sent.keys() == {"part_0", "part_1"}
    assert run.answered.keys() == {JOINT_RECORD}
    assert run.stated == {}
    assert run.round().sent.keys() == {JOINT_RECORD}


def test_an_answer_of_one_record_and_a_message_of_one_are_not_joint(helpers):
    run = Run(helpers, adapters(3), codec="small").round()
    run.round(answers=["part_1"])
    assert run.answered.keys() == {"part_1"}
    assert run.stated.keys() == {"part_0", "part_2"}
    run.round("part_2")
    assert run.sent.keys() == {"part_2"}
    run.round()  # the roll is that of the last message of several
    assert run.sent.keys() == {JOINT_RECORD}


def test_other_records_than_the_last_time_are_named_anew(helpers):
    run = Run(helpers, adapters(3), codec="small").round().round()
    size = run.beside(run.round().sent)
    run.round("part_2", "part_0")
    assert list(run.read) == ["part_2", "part_0"]
    run.round("part_2", "part_0")
    assert run.beside(run.sent) < size
    run.round("part_1", "part_2")
    assert list(run.read) == ["part_1", "part_2"]


@pytest.mark.parametrize("damage", ["lost", "damaged", "everything"])
def test_a_client_that_lost_the_roll_is_sent_all_of_it(helpers, damage):
    run = Run(helpers, adapters(2), codec="small").round().round()
    if damage == "everything":
        run.storage.clear()
    elif damage == "lost":
        del run.storage["roll"]
    else:
        run.storage["roll"] = b"["
    before = dict(run.storage)
    with pytest.raises(LostReferenceError, match="roll"):
        run.round()
    assert run.storage == before
    assert set(run.round().read) == {"part_0", "part_1"}
    run.round()


def test_a_server_that_starts_again_goes_on_with_records_apart(helpers):
    run = Run(helpers, adapters(2), codec="small").round().round()
    run.encoder = run.pair.encoder = DownlinkEncoder(run.pair.settings)
    run.put(run.states)
    assert run.round().sent.keys() == {"part_0", "part_1"}
    assert run.round().sent.keys() == {JOINT_RECORD}


def test_an_answer_that_refers_to_another_message_is_refused(helpers):
    run = Run(helpers, adapters(2), codec="small").round()
    answered = run.answered
    for _ in range(REMEMBERED):
        run.round()
    with pytest.raises(MismatchError, match="refers to roll"):
        run.pair.reader(strict=False).read_all(answered)


def test_rolls_are_kept_for_the_last_messages_of_each_client(helpers):
    run = Run(helpers, adapters(2), codec="small")
    for number in range(3):
        for client in ("a", "b", "c"):
            run.encoder.encode_all(client, tuple(run.states))
        run.states = {n: helpers.moved(s, seed=number) for n, s in run.states.items()}
        run.put(run.states)
    for number in range(REMEMBERED + 3):
        run.encoder.encode_all("a", tuple(run.states))
        run.states = {n: helpers.moved(s, seed=9 + number) for n, s in run.states.items()}
        run.put(run.states)
    assert len(run.encoder.rolls) <= REMEMBERED + 3


def test_a_record_may_not_come_twice(helpers):
    run = Run(helpers, adapters(2), codec="small").round()
    twice = {**run.answered, "part_0": run.apart(run.answered)["part_0"]}
    with pytest.raises(PayloadError, match="twice"):
        run.pair.reader(strict=False).read_all(twice)


def test_records_of_one_payload_count_and_share_the_budget(helpers):
    """The gate behind it is the same as for records apart."""
    run = Run(helpers, adapters(2), codec="none").round()
    reader = run.pair.reader(strict=False)
    reader.read_all(run.answered)
    assert reader.budget.left < run.pair.reader(strict=False).budget.left
