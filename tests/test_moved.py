"""Paths of 0.1 still lead to the modules; nothing of the core uses them."""

import importlib
import pickle
import subprocess
import sys

import pytest

import fedpara_plugins
from fedpara_plugins import _moved


@pytest.fixture
def fresh(monkeypatch):
    """Modules that were imported by old paths before are forgotten."""
    for name in [n for n in sys.modules if _moved.new_path(n)]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize("old", sorted(_moved._MOVED))
def test_an_old_path_gives_the_new_module_and_says_so(old, fresh):
    new = importlib.import_module(f"fedpara_plugins.{_moved._MOVED[old]}")
    with pytest.warns(DeprecationWarning, match=f"{old} has moved to {new.__name__}"):
        assert importlib.import_module(f"fedpara_plugins.{old}") is new
    assert new.__spec__.name == new.__name__


def test_below_a_moved_package_there_is_no_second_copy(fresh):
    with pytest.warns(DeprecationWarning, match=r"factors\.fast\.buffers"):
        import fedpara_plugins.fast.buffers
    from fedpara_plugins.factors.fast import buffers

    assert fedpara_plugins.fast.buffers is buffers


@pytest.mark.parametrize("name", ["convert", "report", "split"])
def test_a_function_stays_what_it_is_when_the_old_module_is_imported(name, fresh):
    function = getattr(fedpara_plugins, name)
    with pytest.warns(DeprecationWarning, match=name):
        module = importlib.import_module(f"fedpara_plugins.{name}")
    assert getattr(fedpara_plugins, name) is function
    assert getattr(module, name) is function


def test_what_was_pickled_by_an_old_path_loads(fresh):
    from fedpara_plugins.factors.plan import WeightSlot

    slot = WeightSlot("weight", (8, 8), 8, 0.1)
    old = pickle.dumps(slot, protocol=0).replace(
        b"fedpara_plugins.factors.plan", b"fedpara_plugins.plan"
    )
    with pytest.warns(DeprecationWarning, match="factors.plan"):
        assert pickle.loads(old) == slot


RENAMED = [
    ("codecs", "Payload", "DecodedPayload"),
    ("ledger", "Line", "LedgerLine"),
    ("ledger", "Sum", "RunningTotals"),
    ("support.storage", "Part", "PrefixView"),
    ("references", "Coded", "EncodedDownlink"),
    ("references", "Received", "DecodedDownlink"),
    ("references", "alike", "same_layout"),
    ("references", "shared_part", "shared_tensors"),
    ("optimizers", "Kept", "CorrectionState"),
    ("optimizers", "Norms", "NormHistory"),
    ("optimizers", "OwnState", "StoredCorrectionState"),
    ("optimizers", "Reply", "ClientUpdate"),
    ("optimizers", "Verdict", "ChangeOutcome"),
    ("optimizers", "difference", "subtract"),
    ("optimizers", "tell_verdict", "log_outcome"),
    ("optimizers", "watching", "observe_steps"),
]


@pytest.mark.parametrize(("module", "old", "new"), RENAMED)
def test_an_old_name_gives_the_new_object_and_says_so(module, old, new):
    found = importlib.import_module(f"fedpara_plugins.{module}")
    with pytest.warns(DeprecationWarning, match=f"{old} has been renamed {new}"):
        assert getattr(found, old) is getattr(found, new)
    assert new in found.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = found.nothing


def test_other_names_are_not_there():
    from fedpara_plugins import references

    with pytest.raises(AttributeError, match="references' has no attribute 'nothing'"):
        _ = references.nothing
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fedpara_plugins.nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("fedpara_plugins.nothing")


def test_the_warning_names_the_line_that_imports(fresh, tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import fedpara_plugins\nfrom fedpara_plugins.plan import WeightPlan\n")
    done = subprocess.run(
        [sys.executable, "-W", "always", script], capture_output=True, text=True, check=True
    )
    assert f"{script}:2: DeprecationWarning" in done.stderr
