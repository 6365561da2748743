"""References on a disk that refuses them: memory within its bound, then full coded downlinks."""

from __future__ import annotations

import errno

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.codecs import parse_codec
from fedpara_plugins.references import (
    ClientReferences,
    GridDownlink,
    PerClientDownlink,
    ReferenceStore,
)
from fedpara_plugins.references import store as store_module
from fedpara_plugins.references.version_log import Version, VersionLog
from fedpara_plugins.support import Outages

SIZE = 4000
CODEC = parse_codec("delta+quantise:rms=2+zlib")


@pytest.fixture
def full(monkeypatch):
    def refused(path, data, *, private=False):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store_module, "replace_file", refused)


def state(seed):
    return {"x": torch.randn(SIZE // 4, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("folder", [True, False])
def test_memory_takes_the_place_of_the_disk_within_its_bound(tmp_path, full, caplog, folder):
    outages = Outages()
    store = ReferenceStore(
        memory_bytes=8 * SIZE, folder=tmp_path if folder else None, outages=outages
    )
    digests = [store.add(state(seed)) for seed in range(12)]
    assert store.memory_used <= 8 * SIZE
    assert [digest in store for digest in digests] == [False] * 4 + [True] * 8
    assert torch.equal(store[digests[-1]]["x"], state(11)["x"])
    assert caplog.text.count("references cannot be written") == 1
    assert "No space left on device" in outages.last_line()


def test_the_newest_states_stay_whatever_the_bound(full):
    """Answers to the messages of this moment are coded against them."""
    store = ReferenceStore(memory_bytes=0)
    digests = [store.add(state(seed)) for seed in range(6)]
    assert [digest in store for digest in digests] == [False] * 2 + [True] * 4


def test_a_folder_in_a_states_place_is_set_aside(tmp_path, caplog):
    digest = ReferenceStore(folder=tmp_path).add(state(0))
    path = tmp_path / f"{digest}.safetensors"
    path.unlink()
    path.mkdir()
    store = ReferenceStore(folder=tmp_path)
    assert digest not in store
    assert f"{path} is damaged (it is not a file)" in caplog.text
    store.add(state(0))
    assert torch.equal(ReferenceStore(folder=tmp_path)[digest]["x"], state(0)["x"])


def test_states_are_their_owner_s_alone(tmp_path):
    store = ReferenceStore(folder=tmp_path / "references" / "states")
    store.add(state(0))
    (path,) = (tmp_path / "references" / "states").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert {p.stat().st_mode & 0o777 for p in path.parents[:2]} == {0o700}


def awakening(number, clients):
    """One client after the other, and then all of them, each with a state of its own."""
    return [number] if number < clients else list(range(clients))


def changing(number, clients):
    """Each client is away in every third round."""
    return [client for client in range(clients) if (client + number) % 3]


@pytest.mark.parametrize("scheme", [PerClientDownlink, GridDownlink])
@pytest.mark.parametrize("awake", [awakening, changing])
@pytest.mark.parametrize("states", [1000, 8, 0])
def test_every_message_can_be_decoded_and_every_answer_too(tmp_path, full, scheme, awake, states):
    torch.manual_seed(0)
    model = fedpara.convert(nn.Sequential(nn.Linear(48, 40)), gamma=0.1, init="seeded")
    spec, first = fedpara.ModelSpec.of(model), dict(model.state_dict())
    bound = states * sum(value.nbytes for value in first.values())
    downlink = scheme(folder=tmp_path, memory_bytes=bound)
    clients = [ClientReferences() for _ in range(12)]
    for number in range(len(clients) + 3):
        shared = {k: v + 0.01 * number * torch.randn_like(v) for k, v in first.items()}
        sent = {}
        for client in awake(number, len(clients)):
            message = downlink.encode(str(client), "model", shared, spec=spec, codec=CODEC)
            received = clients[client].receive("model", message.payload, limit=10**7)
            clients[client].keep("model", received)
            sent[client] = received
        for client, received in sent.items():
            known = downlink.references[received.reference]
            assert all(torch.equal(known[k], v) for k, v in received.tensors.items())
            downlink.acknowledge(str(client), "model", received.reference)
        if states >= 8:
            assert downlink._store.memory_used <= bound
    downlink.close()


def test_a_damaged_version_begins_the_record_anew(tmp_path, caplog):
    log = VersionLog(tmp_path / "grid.sqlite", keep=4)
    for number in (1, 2):
        log.add("model", Version(number, f"r{number}", f"c{number}", {"x": -3}))
    log._database.change(
        lambda db: db.execute("UPDATE versions SET exponents = '[1]' WHERE number = 2")
    )
    assert log.last("model") is None
    assert "the last version of 'model' is damaged" in caplog.text
    log.add("model", Version(1, "r", "c", {"x": None}))
    assert log.last("model") == Version(1, "r", "c", {"x": None})
