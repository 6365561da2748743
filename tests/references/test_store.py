"""States by hash: bounded memory, files that survive, damage that is noticed."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.codecs import reference_hash
from fedpara_plugins.references import ReferenceStore

SIZE = 4000


def state(seed):
    return {"x": torch.randn(SIZE // 4, generator=torch.Generator().manual_seed(seed))}


def test_what_was_added_is_found_under_its_hash(tmp_path):
    store = ReferenceStore(folder=tmp_path)
    digest = store.add(state(0))
    assert digest == reference_hash(state(0))
    assert torch.equal(store[digest]["x"], state(0)["x"])
    assert (digest in store, list(store), len(store)) == (True, [digest], 1)
    with pytest.raises(KeyError):
        store["0" * 64]


def test_later_changes_of_the_callers_tensors_do_not_reach_it():
    store, mine = ReferenceStore(), state(0)
    digest = store.add(mine)
    mine["x"].zero_()
    assert torch.equal(store[digest]["x"], state(0)["x"])


@pytest.mark.parametrize("folder", [True, False])
def test_memory_stays_below_its_bound_and_all_is_found(tmp_path, folder):
    store = ReferenceStore(memory_bytes=3 * SIZE, folder=tmp_path if folder else None)
    digests = [store.add(state(seed)) for seed in range(10)]
    assert store.memory_used <= 3 * SIZE
    for seed, digest in enumerate(digests):
        assert torch.equal(store[digest]["x"], state(seed)["x"])
        assert store.memory_used <= 3 * SIZE
    assert len(store) == 10
    store.close()


def test_without_a_folder_nothing_is_written_before_memory_is_full():
    store = ReferenceStore(memory_bytes=3 * SIZE)
    for seed in range(3):
        store.add(state(seed))
    assert store._temporary is None
    store.add(state(3))
    folder = store._folder
    assert len(list(folder.iterdir())) == 1
    store.close()
    assert not folder.exists()


def test_the_least_recently_used_goes_to_a_file_first():
    store = ReferenceStore(memory_bytes=2 * SIZE)
    first, second = (store.add(state(seed)) for seed in range(2))
    store[first]
    store.add(state(2))
    assert [path.stem for path in store._folder.iterdir()] == [second]
    store.close()


def test_a_folder_is_found_again(tmp_path):
    digest = ReferenceStore(folder=tmp_path).add(state(0))
    assert torch.equal(ReferenceStore(folder=tmp_path)[digest]["x"], state(0)["x"])


def test_what_is_discarded_leaves_no_file(tmp_path):
    store = ReferenceStore(folder=tmp_path)
    kept, gone = store.add(state(0)), store.add(state(1))
    store.retain({kept})
    assert gone not in store
    assert [path.stem for path in tmp_path.iterdir()] == [kept]
    store.discard(kept)
    assert (len(store), list(tmp_path.iterdir()), store.memory_used) == (0, [], 0)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    ],
)
def test_a_damaged_file_counts_as_not_held(tmp_path, damage, caplog):
    digest = ReferenceStore(folder=tmp_path).add(state(0))
    path = next(tmp_path.iterdir())
    path.write_bytes(damage(path.read_bytes()))
    store = ReferenceStore(folder=tmp_path)
    assert store.get(digest) is None
    assert digest not in store
    assert "damaged" in caplog.text


def test_a_sound_file_under_another_name_counts_as_not_held(tmp_path):
    digest = ReferenceStore(folder=tmp_path).add(state(0))
    other = "f" * 64
    next(tmp_path.iterdir()).rename(tmp_path / f"{other}.safetensors")
    store = ReferenceStore(folder=tmp_path)
    assert store.get(other) is None
    assert digest not in store


def test_a_file_that_was_not_finished_is_removed(tmp_path):
    (tmp_path / "abc.tmp").write_bytes(b"half")
    store = ReferenceStore(folder=tmp_path)
    assert (len(store), list(tmp_path.iterdir())) == (0, [])
