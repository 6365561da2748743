"""A folder with a user's own module of factories, and the command run inside this process."""

import shutil
import sys
from pathlib import Path

import pytest

from fedpara_plugins.cli.command import main

MODELS = Path(__file__).with_name("user_models.py")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copy(MODELS, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "user_models", raising=False)
    yield tmp_path
    sys.modules.pop("user_models", None)


@pytest.fixture
def command(folder, capsys):
    """Runs ``fedpara`` with these words; gives exit code, stdout and stderr."""

    def run(*words):
        path = list(sys.path)
        capsys.readouterr()
        code = main([str(word) for word in words])
        assert sys.path == path
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def refused(command):
    """Runs a command that must fail in one line; gives that line."""

    def run(*words, code=2):
        got, out, err = command(*words)
        assert (got, out) == (code, "")
        assert err.startswith("fedpara: error: ")
        assert err.count("\n") == 1
        assert err.endswith("\n")
        return err

    return run
