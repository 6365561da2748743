"""Which version of headers is sent: sides one release apart agree, what is lost is sent again."""

from __future__ import annotations

import pytest

from fedpara_plugins.codecs import peek_header, readable
from fedpara_plugins.codecs.description import NO_DESCRIPTION
from fedpara_plugins.errors import MismatchError
from fedpara_plugins.exchange import DownlinkEncoder
from fedpara_plugins.exchange.descriptions import MOST_KNOWN
from fedpara_plugins.references import LostReferenceError

OLD = ("zlib", "ans")


class Run:
    """Rounds of a server and one client, as adapters run them; lengths of what was sent."""

    def __init__(self, pair, helpers, *, old_client=False):
        self.pair, self.helpers, self.old_client = pair, helpers, old_client
        self.sent = self.answered = None
        self.stated = {}

    def round(self, *records):
        pair = self.pair
        self.sent = pair.payloads(*records)
        client_round = pair.round()
        try:
            client_round.receive(self.sent)
        except LostReferenceError:
            pair.encoder.note_refusal("7", client_round.known_hashes())
            raise
        part = client_round.received["model"]
        answer = self.helpers.moved(part.user_tensors, seed=9)
        self.answered = client_round.encode(client_round.prepare_reply({"model": answer}))
        client_round.keep()
        self.stated = client_round.received_hashes
        decoders = OLD if self.old_client else client_round.decoders
        reader = pair.reader()
        self.read = reader.read_all(self.answered)
        pair.encoder.acknowledge("7", {**reader.references, **self.stated}, decoders)
        pair.encoder.put("model", self.helpers.moved(pair.state, 5), pair.spec)
        return self.forms

    @property
    def forms(self):
        """Version and whether a description is referred to, down and up."""
        headers = peek_header(self.sent["model"]), peek_header(self.answered["model"])
        return tuple((h.version, h.description not in (None, NO_DESCRIPTION)) for h in headers)


@pytest.fixture(params=["small", "lossless", "int8", "none"])
def codec(request):
    return request.param


def test_the_first_message_is_version_1_and_all_others_refer_to_it(helpers, codec):
    run = Run(helpers.Pair(codec=codec), helpers)
    assert run.round() == ((1, False), (2, True))
    first = len(run.sent["model"])
    assert run.round() == ((2, True), (2, True))
    assert run.round() == ((2, True), (2, True))
    assert len(run.sent["model"]) < first
    assert set(run.read["model"].shared) == set(run.pair.shared)


def test_a_later_message_does_not_repeat_what_the_other_side_has(helpers):
    run = Run(helpers.Pair(codec="small"), helpers)
    run.round()
    assert run.stated.keys() == {"model"}  # a server that reads version 1 alone needs it
    run.round()
    assert run.stated == {}
    assert run.pair.round().decoders == readable()
    again = run.pair.received()
    assert (again.decoders, again.received_hashes.keys()) == ((), {"model"})  # nothing encoded yet


def test_an_older_client_is_sent_version_1_for_ever(helpers, codec):
    run = Run(helpers.Pair(codec=codec), helpers, old_client=True)
    for _ in range(3):
        run.round()
        assert peek_header(run.sent["model"]).version == 1


def test_an_older_server_is_answered_in_version_1(helpers, codec, monkeypatch):
    """It says what it decodes as before, and needs all that a reply used to state."""
    run = Run(helpers.Pair(codec=codec), helpers)
    monkeypatch.setattr("fedpara_plugins.exchange.headers.readable", lambda: OLD)
    for _ in range(3):
        run.pair.encoder._decoders.pop("7", None)
        assert run.round() == ((1, False), (1, False))
        assert run.stated.keys() == {"model"}


def test_a_client_that_lost_its_description_is_sent_a_whole_header(helpers, codec):
    run = Run(helpers.Pair(codec=codec), helpers)
    run.round()
    run.round()
    del run.pair.storage["reference/model/description"]
    before = dict(run.pair.storage)
    with pytest.raises(LostReferenceError, match="refers to description"):
        run.round()
    assert run.pair.storage == before
    assert run.round()[0] == (2, False)
    assert run.round()[0] == (2, True)


def test_a_damaged_description_counts_as_lost(helpers):
    run = Run(helpers.Pair(codec="small"), helpers)
    run.round()
    run.pair.storage["reference/model/description"] = b"damaged"
    with pytest.raises(LostReferenceError):
        run.round()
    assert run.round()[0] == (2, False)


def test_a_client_that_lost_everything_goes_on(helpers):
    run = Run(helpers.Pair(codec="small"), helpers)
    run.round()
    run.pair.storage.clear()
    with pytest.raises(LostReferenceError):
        run.round()
    assert run.round()[0] == (2, False)


def test_a_server_that_starts_again_knows_nothing_and_sends_version_1(helpers):
    run = Run(helpers.Pair(codec="small"), helpers)
    run.round()
    run.round()
    run.pair.encoder = DownlinkEncoder(run.pair.settings)
    run.pair.encoder.put("model", run.pair.state, run.pair.spec)
    assert run.round() == ((1, False), (2, True))
    assert run.round() == ((2, True), (2, True))


def test_a_client_that_answers_with_an_error_is_asked_anew(helpers):
    """Its program may have been replaced by an older release."""
    run = Run(helpers.Pair(codec="small"), helpers)
    run.round()
    run.round()
    run.pair.encoder.note_failure("7")
    assert peek_header(run.pair.payloads()["model"]).version == 1


def test_a_message_that_was_never_answered_changes_nothing(helpers):
    run = Run(helpers.Pair(codec="small"), helpers)
    run.pair.payloads()
    run.pair.encoder.acknowledge("7", {}, ("payload2",))
    assert run.round()[0] == (2, False)


def test_another_model_is_described_anew(helpers):
    run = Run(helpers.Pair(codec="lossless", method="none"), helpers)
    run.round()
    run.round()
    shared = {name: run.pair.state[name] for name in list(run.pair.state)[:3]}
    run.pair.encoder.put("model", shared, run.pair.spec)
    data = run.pair.payloads()["model"]
    assert peek_header(data).description == NO_DESCRIPTION


def test_an_unknown_description_in_a_reply_is_refused(helpers):
    """A client cannot put one into the server's store: it knows what it has sent, and no more."""
    run = Run(helpers.Pair(codec="small"), helpers)
    run.round()
    run.round()
    known = dict(run.pair.encoder.descriptions)
    run.pair.encoder._descriptions._known.clear()
    with pytest.raises(MismatchError, match="refers to description"):
        run.pair.reader().read("model", run.answered["model"])
    assert set(known) >= set(run.pair.encoder.descriptions)


def test_the_servers_store_is_bounded(helpers):
    pair = helpers.Pair(codec="small", method="none")
    for count in range(MOST_KNOWN + 20):
        part = {f"{name}{count}": value for name, value in pair.shared.items()}
        pair.encoder.put("model", part, pair.spec)
    assert len(pair.encoder.descriptions) == MOST_KNOWN
