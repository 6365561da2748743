"""What a client keeps changes in one step, and survives a process that is killed meanwhile."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from fedpara_plugins.support import FileStorage, PrefixView, replace_file

KILLS = 20
SIZE = 300_000


def test_changes_are_seen_at_once_and_last_from_commit_on(tmp_path):
    path = tmp_path / "deep" / "client.sqlite"
    storage = FileStorage(path)
    storage["a"] = b"1"
    storage["b"] = b"2"
    assert (dict(storage), len(storage), "a" in storage, "c" in storage) == (
        {"a": b"1", "b": b"2"}, 2, True, False,
    )  # fmt: skip
    assert dict(FileStorage(path)) == {}
    storage.commit()
    del storage["a"]
    storage["b"] = b"3"
    assert dict(storage) == {"b": b"3"}
    storage.close()
    again = FileStorage(path)
    assert dict(again) == {"a": b"1", "b": b"2"}
    del again["a"]
    again.commit()
    assert dict(FileStorage(path)) == {"b": b"2"}


def test_what_is_not_there_is_a_key_error(tmp_path):
    storage = FileStorage(tmp_path / "client.sqlite")
    for absent in (lambda: storage["x"], lambda: storage.__delitem__("x")):
        with pytest.raises(KeyError):
            absent()
    storage["x"] = b""
    del storage["x"]
    with pytest.raises(KeyError):
        storage["x"]


def test_a_prefix_view_has_the_entries_of_one_prefix(tmp_path):
    storage = FileStorage(tmp_path / "client.sqlite")
    storage["other"] = b"0"
    part = PrefixView(storage, "reference/")
    part["arrays/last"] = b"1"
    assert (dict(part), len(part)) == ({"arrays/last": b"1"}, 1)
    assert storage["reference/arrays/last"] == b"1"
    assert "other" not in part
    del part["arrays/last"]
    assert dict(storage) == {"other": b"0"}


def test_a_damaged_file_is_set_aside_and_said(tmp_path, caplog):
    path = tmp_path / "client.sqlite"
    storage = FileStorage(path)
    storage["a"] = b"x" * 10_000
    storage.commit()
    storage.close()
    path.write_bytes(b"not a database" + path.read_bytes()[14:])
    assert dict(FileStorage(path)) == {}
    assert "client.sqlite is damaged" in caplog.text
    assert "begins anew" in caplog.text
    assert path.with_suffix(".damaged").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX")
def test_a_process_that_is_killed_leaves_all_of_a_commit_or_none(tmp_path):
    path, draw = tmp_path / "client.sqlite", random.Random(0)
    last = 0
    for _ in range(KILLS):
        committed, says = os.pipe()
        child = os.fork()
        if not child:
            try:
                _commit_for_ever(path, last, says)
            finally:
                os._exit(1)
        os.close(says)
        # However slow the machine is, the kill falls into a later commit, or between two.
        assert os.read(committed, 1) == b"1"
        os.close(committed)
        time.sleep(draw.uniform(0.0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        entries = dict(FileStorage(path))
        assert len(set(entries.values())) <= 1
        assert set(entries) in (set(), set("abcd"))
        now = int.from_bytes(entries["a"][:4], "big") if entries else 0
        assert now > last
        assert all(value == now.to_bytes(4, "big") * (SIZE // 4) for value in entries.values())
        last = now


def _commit_for_ever(path, last, says):
    storage, number = FileStorage(path), last
    while True:
        number += 1
        for name in "abcd":
            storage[name] = number.to_bytes(4, "big") * (SIZE // 4)
        storage.commit()
        if number == last + 1:
            os.write(says, b"1")


def test_a_file_is_written_whole(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"first")

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, b"second")
    assert path.read_bytes() == b"first"
