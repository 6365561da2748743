"""A state-dir is held by one run at a time, is private, and is tidied when a run begins."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedpara_plugins import ConfigError
from fedpara_plugins.support import Outages, hold_state_dir, os_locks
from fedpara_plugins.support import state_dir as module

ODD = [b"", b"\xff\xfe", b"[1]", b"[" * 5000, b'{"pid": "\\u001b[31m"}']
HOLDER = """
import os, sys
from pathlib import Path
from fedpara_plugins.support import hold_state_dir
folder, run, role, forks = sys.argv[1:]
hold = hold_state_dir(Path(folder), run=run, role=role)
child = os.fork() if forks == "fork" else 1
if not child:
    sys.stdin.readline()
    os._exit(0)
print("held", flush=True)
sys.stdin.readline()
hold.release()
print("released", flush=True)
sys.stdin.readline()
"""


class Holder:
    """Another process that holds a state-dir."""

    def __init__(self, folder, run, role="", forks=""):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(folder), run, role, forks],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout.readline() == "held\n"

    def release(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "released\n"

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def held(tmp_path):
    holders = []

    def hold(run, role="", forks=""):
        holders.append(Holder(tmp_path / "state", run, role, forks))
        return holders[-1]

    yield hold
    for holder in holders:
        holder.end()


def refusal(tmp_path, run, role=""):
    with pytest.raises(ConfigError) as found:
        hold_state_dir(tmp_path / "state", run=run, role=role)
    return str(found.value)


def test_a_second_run_is_told_who_holds_it_and_processes_of_one_share_it(tmp_path, held):
    first = held("17", "server")
    told = refusal(tmp_path, "18")
    for fact in ("run 17", f"host {socket.gethostname()}", f"process {first.process.pid}"):
        assert fact in told
    assert "\n" not in told
    with hold_state_dir(tmp_path / "state", run="17"), hold_state_dir(tmp_path / "state", run="17"):
        first.release()
        with pytest.raises(ConfigError, match=f"run 17, .* process {os.getpid()}"):
            hold_state_dir(tmp_path / "state", run="18")
    with hold_state_dir(tmp_path / "state", run="18"):
        pass


def test_a_role_belongs_to_one_process(tmp_path, held):
    first = held("0", "server")
    assert f"process {first.process.pid}: refused to a second server of run 0" in refusal(
        tmp_path, "0", "server"
    )
    with hold_state_dir(tmp_path / "state", run="0", role="client 1"):
        pass


@pytest.mark.parametrize("forks", ["", "fork"])
def test_a_killed_process_holds_nothing_any_more(tmp_path, held, forks):
    """Its workers, which it had forked, may live on."""
    held("17", "server", forks).kill()
    with hold_state_dir(tmp_path / "state", run="18", role="server"):
        assert len(list((tmp_path / "state" / "locks").glob("*.member"))) == 1
    assert not list((tmp_path / "state" / "locks").glob("*.member"))


def test_a_stopped_process_still_holds_it(tmp_path, held):
    first = held("17")
    first.process.send_signal(signal.SIGSTOP)
    assert "run 17" in refusal(tmp_path, "18")
    first.process.send_signal(signal.SIGCONT)


def test_the_same_folder_under_another_name_is_the_same(tmp_path, held):
    held("17")
    (tmp_path / "link").symlink_to(tmp_path / "state")
    with pytest.raises(ConfigError, match="run 17"):
        hold_state_dir(tmp_path / "link", run="18")


@pytest.mark.parametrize("content", ODD)
def test_a_holder_that_cannot_be_named_still_holds(tmp_path, held, content):
    held("17")
    (member,) = (tmp_path / "state" / "locks").glob("*.member")
    member.write_bytes(content)
    told = refusal(tmp_path, "18")
    assert "in use by run of unknown id" in told
    assert told.isprintable()


@pytest.fixture
def keepers():
    """Long-lived processes; each call starts one and returns it as a keeper."""
    processes = []

    def keeper(group):
        processes.append(subprocess.Popen(["sleep", "600"]))
        pid = processes[-1].pid
        return module.Keeper(pid, os_locks.started_at(pid), group, f"a node of {group}")

    keeper.kill = lambda place: (processes[place].kill(), processes[place].wait())
    yield keeper
    for process in processes:
        process.kill()
        process.wait()


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")


@needs_proc
def test_a_keeper_holds_it_between_messages_and_until_it_ends(tmp_path, keepers):
    folder = tmp_path / "state"
    mine, friend, other = keepers("a:1"), keepers("a:1"), keepers("b:2")
    hold_state_dir(folder, run="17", keeper=mine).release()
    hold_state_dir(folder, run="18", keeper=mine).release()
    hold_state_dir(folder, run="18", keeper=friend).release()
    with pytest.raises(ConfigError) as found:
        hold_state_dir(folder, run="99", keeper=other)
    text = str(found.value)
    assert "in use by run 18" in text
    assert f"host {socket.gethostname()}" in text
    assert any(f"process {each.pid} (a node of a:1)" in text for each in (mine, friend))
    assert "refused to run 99" in text
    keepers.kill(0)
    with pytest.raises(ConfigError, match=f"process {friend.pid} "):
        hold_state_dir(folder, run="99", keeper=other)
    keepers.kill(1)
    hold_state_dir(folder, run="99", keeper=other).release()
    with pytest.raises(ConfigError, match="run 99"):
        hold_state_dir(folder, run="18", keeper=keepers("a:1"))
    hold_state_dir(folder, run="100", role="server").release()  # it knows no group


@needs_proc
def test_a_keeper_is_named_though_its_process_works_on_a_message(tmp_path, keepers):
    folder = tmp_path / "state"
    mine, other = keepers("a:1"), keepers("b:2")
    with (
        hold_state_dir(folder, run="17", keeper=mine),
        subprocess_refused(folder, "99", other) as text,
    ):
        assert f"process {mine.pid} (a node of a:1)" in text


@contextlib.contextmanager
def subprocess_refused(folder, run, keeper):
    """Yield what another process is told."""
    code = (
        "import sys; from pathlib import Path; from fedpara_plugins.support import *\n"
        "folder, run, pid, started, group = sys.argv[1:]\n"
        "hold_state_dir(Path(folder), run=run, keeper=Keeper(int(pid), started, group))"
    )
    arguments = [str(folder), run, str(keeper.pid), keeper.started, keeper.group]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    yield done.stderr


@needs_proc
def test_a_run_that_goes_on_keeps_it_between_its_messages(tmp_path, keepers):
    folder = tmp_path / "state"
    mine, friend = keepers("a:1"), keepers("a:1")
    hold_state_dir(folder, run="17", keeper=mine, others=["16", "18"]).release()
    for keeper in (mine, friend):
        with pytest.raises(ConfigError) as found:
            hold_state_dir(folder, run="18", keeper=keeper, others=["17"])
        text = str(found.value)
        assert f"in use by run 17, host {socket.gethostname()}, process {mine.pid}" in text
        assert "refused to run 18. Choose another state-dir, or wait until that run has" in text
    hold_state_dir(folder, run="17", keeper=friend, others=["18"]).release()
    keepers.kill(0)
    keepers.kill(1)
    hold_state_dir(folder, run="18", keeper=keepers("a:1"), others=["17"]).release()
    hold_state_dir(folder, run="19", keeper=keepers("a:1")).release()  # 18 has ended


@needs_proc
@pytest.mark.parametrize("content", [*ODD, b'{"pid": 1, "started": "0"}'])
def test_an_odd_entry_of_a_keeper_is_none(tmp_path, keepers, content):
    hold_state_dir(tmp_path / "state", run="17").release()
    (tmp_path / "state" / "locks" / "x.keeper").write_bytes(
        content.replace(b"{", b'{"host": "%s", ' % socket.gethostname().encode())
    )
    hold_state_dir(tmp_path / "state", run="18", keeper=keepers("a:1")).release()


def test_a_keeper_of_another_host_counts_as_alive(tmp_path):
    hold_state_dir(tmp_path / "state", run="17").release()
    path = tmp_path / "state" / "locks" / "far-7.keeper"
    path.write_text(json.dumps({"host": "far", "pid": 7, "group": "a:1", "run": "17"}))
    with pytest.raises(ConfigError, match="host far, process 7") as found:
        hold_state_dir(tmp_path / "state", run="18", keeper=module.Keeper(1, "1", "b:2"))
    assert str(path) in str(found.value)


@needs_proc
def test_when_a_process_started_and_by_which():
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert os_locks.started_at(os.getpid()) == os_locks.started_at(os.getpid()) is not None
    assert os_locks.parent_of(os.getpid()) == os.getppid()
    assert os_locks.started_at(ended.pid) is None
    assert os_locks.parent_of(ended.pid) is None


def test_a_release_happens_once(tmp_path):
    hold = hold_state_dir(tmp_path / "state", run="1")
    other = hold_state_dir(tmp_path / "state", run="1")
    hold.release()
    hold.release()
    with pytest.raises(ConfigError):
        hold_state_dir(tmp_path / "state", run="2")
    other.release()
    hold_state_dir(tmp_path / "state", run="2").release()


def test_where_there_are_no_locks_processes_are_looked_for(tmp_path, monkeypatch):
    """As on some network file systems: a dead process of this host is known to be gone."""
    for place in (os_locks, module):
        monkeypatch.setattr(place, "try_lock", lambda descriptor: None)
    locks = tmp_path / "state" / "locks"
    locks.mkdir(parents=True)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    about = {"run": "17", "roles": [], "host": socket.gethostname(), "pid": ended.pid}
    (locks / "1.member").write_text(json.dumps(about))
    hold_state_dir(tmp_path / "state", run="18").release()
    for other in ({"host": "elsewhere"}, {"pid": os.getppid()}):
        (locks / "2.member").write_text(json.dumps(about | other))
        told = refusal(tmp_path, "18")
        assert f"if that process is gone, remove {locks / '2.member'}" in told


def test_a_disk_that_refuses_the_lock_costs_the_lock_alone(tmp_path, monkeypatch, caplog):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "new_private_file", full)
    outages = Outages()
    hold_state_dir(tmp_path / "state", run="1", outages=outages).release()
    assert "the lock of the state-dir cannot be written" in caplog.text
    assert "No space left on device" in outages.last_line()


# What is there already


def modes(folder):
    return {stat.S_IMODE(p.lstat().st_mode) for p in (folder, *folder.rglob("*")) if p.is_dir()}, {
        stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()
    }


def test_all_of_an_earlier_version_is_closed(tmp_path, caplog):
    state = tmp_path / "state"
    for name in ("clients/a.sqlite", "server/rounds-0.safetensors", "server/references/x.sqlite"):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_bytes(b"")
    for path in (state, *state.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    (state / "clients" / "link").symlink_to(tmp_path / "elsewhere.txt")
    (tmp_path / "elsewhere.txt").touch()
    (tmp_path / "elsewhere.txt").chmod(0o640)
    with hold_state_dir(state, run="1"):
        assert modes(state) == ({0o700}, {0o600, 0o640})
    assert stat.S_IMODE((tmp_path / "elsewhere.txt").stat().st_mode) == 0o640
    (state / "clients" / "link").unlink()
    assert modes(state) == ({0o700}, {0o600})
    assert caplog.text.count("closed to them now") == 4  # three folders, and the rest in one line


def test_leftovers_go_when_a_run_begins_and_not_before(tmp_path, held):
    first = held("17")
    left = tmp_path / "state" / "server" / "rounds-0.safetensors.1-ab.partial"
    left.write_bytes(b"half")
    with hold_state_dir(tmp_path / "state", run="17"):
        assert left.exists()
    first.end()
    with hold_state_dir(tmp_path / "state", run="17"):
        assert not left.exists()


@pytest.mark.parametrize("special", ["cwd", "home", "shared", "sticky"])
def test_a_folder_that_holds_more_stays_as_open_as_it_was(tmp_path, monkeypatch, special):
    state = tmp_path / "state"
    state.mkdir()
    state.chmod(0o1777 if special == "sticky" else 0o755)
    (state / "code.py").touch()
    if special != "shared":  # a second run finds its own folders there
        (state / "clients").mkdir()
    if special == "cwd":
        monkeypatch.chdir(state)
    if special == "home":
        monkeypatch.setattr(Path, "home", lambda: state)
    before = state.stat().st_mode
    with hold_state_dir(state, run="1"):
        assert state.stat().st_mode == before
        parts = [state / name for name in ("clients", "server", "locks")]
        assert {stat.S_IMODE(part.stat().st_mode) for part in parts} == {0o700}


@pytest.mark.parametrize("part", ["", "clients", "server", "locks"])
def test_a_file_in_a_folder_s_place_is_refused_by_its_name(tmp_path, part):
    path = tmp_path / "state" / part
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    with pytest.raises(ConfigError, match=f"{path}: expected a folder"):
        hold_state_dir(tmp_path / "state", run="1")


@pytest.mark.skipif(os.name != "posix", reason="pipes, sockets and links of POSIX")
@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "symbolic link"])
@pytest.mark.parametrize("name", ["x.member", "mutex"])
def test_what_is_no_lock_is_named_and_not_waited_for(tmp_path, monkeypatch, name, kind):
    locks = tmp_path / "state" / "locks"
    locks.mkdir(parents=True, mode=0o700)
    monkeypatch.chdir(locks)  # the path of a socket is short
    make = {"pipe": os.mkfifo, "folder": os.mkdir, "symbolic link": lambda n: os.symlink(n, n)}
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(name)
    else:
        make[kind](name)
    with pytest.raises(ConfigError, match=f"{locks / name}: expected a file, found a {kind}"):
        hold_state_dir(tmp_path / "state", run="1")


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("umask", [0o777, 0o277, 0o000])
def test_no_umask_changes_the_modes(tmp_path, umask):
    before = os.umask(umask)
    try:
        with hold_state_dir(tmp_path / "state", run="1"):
            assert modes(tmp_path / "state") == ({0o700}, {0o600})
    finally:
        os.umask(before)
