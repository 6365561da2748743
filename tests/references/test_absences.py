"""After any pattern of absences and accidents, both sides hold the very same bits."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpara_plugins.references import ClientReferences

CLIENTS = "abcd"

EVENTS = st.one_of(
    st.tuples(st.just("round"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("round"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("answer lost"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("message lost"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("training failed"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("state lost"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("state restored"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("says it holds nothing"), st.sampled_from(CLIENTS)),
    st.tuples(st.just("new content"), st.integers(0, 9)),
    st.tuples(st.just("server restarts"), st.just(0)),
    st.tuples(st.just("states on disk are lost"), st.just(0)),
)


class Story:
    """Carries out events and checks after each what must hold."""

    def __init__(self, scheme, helpers, folder):
        self.scheme, self.helpers, self.folder = scheme, helpers, folder
        self.exchange = helpers.Exchange(scheme(folder=folder, memory_bytes=20_000))
        self.backups = {}
        self.last = {}

    def tell(self, event, detail):
        getattr(self, event.replace(" ", "_"))(detail)

    def round(self, name, **options):
        # Exchange.round itself checks that at most one repetition is needed, and compares bits.
        messages, received = self.exchange.round(name, **options)
        # The reply is a delta against what was received: the server must find it.
        held = self.exchange.downlink.references[received.reference]
        assert self.helpers.identical(held, received.tensors)
        return messages

    def answer_lost(self, name):
        self.round(name, answers=False)

    def training_failed(self, name):
        self.round(name, keeps=False)

    def message_lost(self, name):
        self.exchange.sent(name)

    def state_lost(self, name):
        self.backups[name] = dict(self.exchange.client(name)._storage)
        self.exchange.clients[name] = ClientReferences()

    def state_restored(self, name):
        self.exchange.clients[name] = ClientReferences(dict(self.backups.get(name, {})))

    def says_it_holds_nothing(self, name):
        self.exchange.clients[name] = ClientReferences()
        self.exchange.downlink.acknowledge(name, "model", None)

    def new_content(self, seed):
        self.exchange.state = self.helpers.moved(self.exchange.state, seed)

    def server_restarts(self, _):
        self.exchange.downlink.close()
        self.exchange.downlink = self.scheme(folder=self.folder, memory_bytes=20_000)

    def states_on_disk_are_lost(self, _):
        self.exchange.downlink.close()
        for path in sorted(self.folder.glob("*/*.safetensors"))[::2]:
            path.unlink()
        self.exchange.downlink = self.scheme(folder=self.folder, memory_bytes=20_000)


@pytest.mark.parametrize("name", ["per client", "grid"])
@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(events=st.lists(EVENTS, min_size=1, max_size=25))
def test_client_and_server_hold_identical_references(name, helpers, events):
    with tempfile.TemporaryDirectory() as folder:
        story = Story(helpers.SCHEMES[name], helpers, Path(folder))
        for event, detail in events:
            story.tell(event, detail)
        for client in CLIENTS:
            story.round(client)
            # What everyone holds in the end is close to the server's state, not just equal bits.
            held = story.exchange.downlink.references[
                story.exchange.client(client).holds("model")[0]
            ]
            for key, value in story.exchange.state.items():
                assert (held[key].double() - value.double()).abs().max() < 0.5, key
        story.exchange.downlink.close()
