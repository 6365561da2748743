"""Kinds for layers of packages that are imported by their users only."""

import importlib
import sys
import types

import pytest
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import PluginError, hookimpl, plugins
from fedpara_plugins.layers import FactorisedLinear, LazyLayer
from fedpara_plugins.plugins import registry

OTHER = """
from torch import nn

class Dense(nn.Linear):
    pass
"""
KIND = """
from other_package import Dense
from fedpara_plugins.layers import FactorisedLinear

class FactorisedDense(FactorisedLinear, Dense):
    kind = "other_dense"
    dense_class = Dense
"""
GOOD = LazyLayer(dense_class="other_package:Dense", kind="kinds_for_other:FactorisedDense")


@pytest.fixture
def other_package(tmp_path, monkeypatch):
    """Two importable modules, neither imported yet: one with a layer, one with its kind."""
    (tmp_path / "other_package.py").write_text(OTHER)
    (tmp_path / "kinds_for_other.py").write_text(KIND)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda: importlib.import_module("other_package")
    for name in ("other_package", "kinds_for_other"):
        sys.modules.pop(name, None)


@pytest.fixture
def registered(monkeypatch):
    def install(*kinds):
        @hookimpl
        def fedpara_register_layers(register):
            for kind in kinds:
                register(kind)

        module = types.ModuleType("thirdparty")
        module.fedpara_register_layers = fedpara_register_layers
        point = types.SimpleNamespace(name="thirdparty", value="thirdparty", load=lambda: module)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])
        plugins.reload()

    yield install
    monkeypatch.undo()
    plugins.reload()


def test_a_kind_is_loaded_when_its_package_is(registered, other_package):
    registered(GOOD)
    fedpara.convert(nn.Linear(64, 64))
    assert "kinds_for_other" not in sys.modules
    dense = other_package().Dense
    layer = fedpara.convert(dense(64, 64))
    assert type(layer).__name__ == "FactorisedDense"
    assert isinstance(layer, dense)
    assert plugins.layers()[dense] is type(layer)
    assert type(fedpara.to_dense(layer)) is dense


def test_two_kinds_for_one_class_name_both_plugins(registered):
    registered(LazyLayer(dense_class="torch.nn.modules.linear:Linear", kind="some:Kind"))
    with pytest.raises(PluginError, match=r"Linear' .*'builtins'.*'thirdparty'"):
        plugins.layers()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("nowhere:Kind", "nowhere:Kind .* other_package:Dense cannot be loaded: No module"),
        ("kinds_for_other:Missing", "cannot be loaded: .*Missing"),
        ("fedpara_plugins.layers:FactorisedLinear", "but replaces torch.nn.modules.linear:Linear"),
    ],
)
def test_a_wrong_registration_is_named(registered, other_package, kind, words):
    registered(LazyLayer(dense_class="other_package:Dense", kind=kind))
    assert FactorisedLinear in plugins.layers().values()
    other_package()
    with pytest.raises(PluginError, match=words):
        plugins.layers()
