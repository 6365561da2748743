"""Runs of one group know of each other while their servers live, and no longer."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile

import pytest

from fedpara_plugins.support import announced_run, live_runs, other_runs

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks that a rename keeps")

SERVER = """
import os, sys
from fedpara_plugins.support import announced_run
with announced_run("18", "a:1"):
    if not (os.fork() if sys.argv[1] else 1):
        sys.stdin.readline()
        os._exit(0)
    print("runs", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"fedpara-runs-{os.getuid()}"


def test_a_run_is_known_to_others_of_its_group_while_it_goes_on(folder):
    with announced_run("17", "a:1"), announced_run("../x", "b:2"):
        assert other_runs("18", "a:1") == ["17"]
        assert other_runs("17", "a:1") == []
        assert other_runs("18", "b:2") == [live_runs._safe("../x")]
        assert other_runs("18", "c:3") == other_runs("18", "") == []
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert other_runs("18", "a:1") == []
    assert list(folder.iterdir()) == []
    with announced_run("17", ""):
        assert list(folder.iterdir()) == []


@pytest.mark.parametrize("forks", ["", "fork"])
def test_a_killed_run_is_known_no_longer(forks):
    """A worker that its server had forked may live on."""
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, forks],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout.readline() == "runs\n"
    assert other_runs("17", "a:1") == ["18"]
    server.send_signal(signal.SIGKILL)
    server.wait()
    assert other_runs("17", "a:1") == []
    server.stdin.close()


def test_a_place_that_cannot_be_used_costs_the_announcement_alone(folder):
    folder.write_text("")
    with announced_run("17", "a:1"):
        assert other_runs("18", "a:1") == []


def test_many_runs_are_told_in_part():
    with announced_run("0", "a:1"):
        pass
    folder = live_runs._folder()
    for number in range(live_runs.MOST + 5):
        (folder / f"a_1.{number}.run").touch()
    assert other_runs("x", "a:1") == []  # none is locked
