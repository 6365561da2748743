"""Private state is readable by its owner alone, whatever the umask, and leftovers go."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedpara_plugins import ConfigError
from fedpara_plugins.support import (
    BackedStorage,
    FileStorage,
    MemoryStorage,
    Outages,
    check_own_file,
    make_private_folder,
    open_database,
    remove_leftovers,
    replace_file,
)
from fedpara_plugins.support.private_files import close_folder_of

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o277], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_clients_file_and_all_beside_it_are_their_owner_s_alone(tmp_path, umask):
    storage = FileStorage(tmp_path / "clients" / "a.sqlite")
    storage["private"] = b"x" * 10_000
    storage.commit()
    files = sorted((tmp_path / "clients").iterdir())
    assert {path.suffix for path in files} == {".sqlite", ".sqlite-wal", ".sqlite-shm"}
    assert [mode(path) for path in files] == [0o600] * 3
    assert mode(tmp_path / "clients") == 0o700


def test_a_file_of_an_earlier_version_is_closed_before_it_is_read(tmp_path, caplog):
    path = tmp_path / "a.sqlite"
    storage = FileStorage(path)
    storage["private"] = b"x"
    storage.commit()
    for file in tmp_path.iterdir():
        file.chmod(0o644)
    again = FileStorage(path)
    assert again["private"] == b"x"
    assert {mode(file) for file in tmp_path.iterdir()} == {0o600}
    assert f"{path} was open to other users (mode 0644)" in caplog.text


def test_a_damaged_file_stays_private(tmp_path):
    path = tmp_path / "a.sqlite"
    path.write_bytes(b"no database" * 1000)
    path.chmod(0o644)
    FileStorage(path)
    assert {file.name: mode(file) for file in tmp_path.iterdir() if "-" not in file.name} == {
        "a.sqlite": 0o600,
        "a.damaged": 0o600,
    }


def test_a_second_damaged_file_leaves_the_first_where_it_is(tmp_path):
    path = tmp_path / "a.sqlite"
    for content in (b"one" * 1000, b"two" * 1000):
        path.write_bytes(content)
        FileStorage(path).close()
    assert (tmp_path / "a.damaged").read_bytes() == b"one" * 1000
    assert (tmp_path / "a.2.damaged").read_bytes() == b"two" * 1000


def test_a_sound_database_with_other_tables_counts_as_damaged(tmp_path, caplog):
    path = tmp_path / "a.sqlite"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE entries (one INTEGER)")
    other.close()
    assert dict(FileStorage(path)) == {}
    assert "its table entries has other columns" in caplog.text


def test_a_value_of_another_type_is_not_there(tmp_path):
    path = tmp_path / "a.sqlite"
    FileStorage(path).close()
    other = sqlite3.connect(path)
    other.execute("INSERT INTO entries VALUES ('private', 'text')")
    other.commit()
    other.close()
    assert FileStorage(path).get("private") is None


def make_folder(path):
    path.mkdir()


def make_loop(path):
    path.symlink_to(path)


def make_link(path):
    (path.parent / "elsewhere").write_bytes(b"")
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("odd", "named"),
    [
        (make_folder, "expected a file, found a folder"),
        (make_loop, "expected a file, found a symbolic link"),
        (make_link, "expected a file, found a symbolic link"),
        (os.mkfifo, "expected a file, found a pipe"),
    ],
)
def test_what_is_no_file_is_refused_by_its_name(tmp_path, odd, named):
    path = tmp_path / "a.sqlite"
    odd(path)
    for attempt in (check_own_file, FileStorage, lambda p: open_database(p, "")):
        with pytest.raises(ConfigError, match=f"{path}: {named}"):
            attempt(path)
    with pytest.raises(ConfigError, match=f"{path}: {named}"):
        BackedStorage(path, MemoryStorage({}), Outages())


def write_file(path):
    path.write_text("")


def make_dangling_link(path):
    path.symlink_to(path.parent / "nothing")


@pytest.mark.parametrize("odd", [write_file, make_loop, make_dangling_link, os.mkfifo])
@pytest.mark.parametrize("below", [False, True])
def test_what_is_no_folder_is_refused_by_its_name(tmp_path, odd, below):
    path = tmp_path / "clients"
    odd(path)
    with pytest.raises(ConfigError, match=str(path)):
        make_private_folder(path / "deep" if below else path)


def test_a_folder_is_made_private_and_an_open_one_closed(tmp_path, umask, caplog):
    made = tmp_path / "made"
    make_private_folder(made)
    assert mode(made) == 0o700
    made.chmod(0o755)
    make_private_folder(made)
    assert mode(made) == 0o700
    assert f"{made} was open to other users (mode 0755)" in caplog.text


def test_what_cannot_be_closed_is_refused(tmp_path, monkeypatch):
    """A file of another user's, say, or one on a file system without modes."""
    path = tmp_path / "a.sqlite"
    FileStorage(path).close()
    path.chmod(0o644)

    def refused(self, mode):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    with pytest.raises(ConfigError, match=r"others may read it \(mode 0644\).*not permitted"):
        FileStorage(path)
    monkeypatch.setattr(Path, "chmod", lambda self, mode: None)
    with pytest.raises(ConfigError, match="its file system keeps no modes"):
        FileStorage(path)


def test_a_folder_with_other_things_in_it_stays_open(tmp_path):
    tmp_path.chmod(0o755)
    own, other = tmp_path / "client-0.safetensors", tmp_path / "paper.pdf"
    for path in (own, other):
        path.touch(mode=0o644)
        path.chmod(0o644)
    close_folder_of(tmp_path, "client-*.safetensors")
    assert (mode(own), mode(other), mode(tmp_path)) == (0o600, 0o644, 0o755)
    other.unlink()
    close_folder_of(tmp_path, "client-*.safetensors")
    assert mode(tmp_path) == 0o700


# Files that are written whole


def test_a_private_file_is_private_from_its_first_byte_on(tmp_path, umask, monkeypatch):
    seen = []
    write = os.write

    def spy(descriptor, data):
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", spy)
    replace_file(tmp_path / "file", b"content", private=True)
    assert seen == [0o600]
    assert mode(tmp_path / "file") == 0o600


def test_another_file_has_the_mode_that_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert mode(tmp_path / "file") == 0o640


def test_a_disk_that_is_full_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    replace_file(path, b"old")
    write = os.write

    def full(descriptor, data):
        if len(data) <= 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:3])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        replace_file(path, b"new content")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")]


WRITER = """
import os, sys
from pathlib import Path
from fedpara_plugins.support import replace_file
def hang(source, target):
    print("writing", flush=True)
    sys.stdin.readline()
os.replace = hang
replace_file(Path(sys.argv[1]), b"x" * 1000)
"""


def test_leftovers_of_the_killed_are_removed_and_those_in_use_stay(tmp_path):
    for name in ("state.1234-abcd.partial", ".tmpQ7x2Fa", "old.tmp", "kept.safetensors"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "folder.tmp").mkdir()
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path / "state")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert writer.stdout.readline() == "writing\n"
    patterns = ("*.partial", "*.tmp", ".tmp*")
    remove_leftovers(tmp_path, patterns)
    names = {path.name for path in tmp_path.iterdir()}
    (living,) = names - {"kept.safetensors", "folder.tmp"}
    assert living.startswith(f"state.{writer.pid}-")
    writer.kill()
    writer.communicate()
    remove_leftovers(tmp_path, patterns)
    assert {path.name for path in tmp_path.iterdir()} == {"kept.safetensors", "folder.tmp"}
