"""Discovery: built-ins come through the same hooks, and faults are loud."""

import subprocess
import sys
import types

import pytest

from fedpara_plugins import ConfigError, PluginError, hookimpl, plugins
from fedpara_plugins.factors.methods import FEDPARA, Method
from fedpara_plugins.layers import FactorisedLinear
from fedpara_plugins.plugins import registry


@pytest.fixture
def with_plugin(monkeypatch):
    """Make pluggy find one more plugin, as if it were installed."""

    def install(**hooks):
        module = types.ModuleType("thirdparty")
        vars(module).update(hooks)
        point = types.SimpleNamespace(name="thirdparty", value="thirdparty", load=lambda: module)
        monkeypatch.setattr(registry, "entry_points", lambda group: [point])
        plugins.reload()

    yield install
    monkeypatch.undo()
    plugins.reload()


def test_built_ins_are_registered():
    assert set(plugins.methods()) >= {"lowrank", "fedpara", "pfedpara"}
    assert set(plugins.stages()) >= {"delta", "int8", "zlib"}
    assert FactorisedLinear in plugins.layers().values()


def test_a_third_party_method_is_picked_up(with_plugin):
    @hookimpl
    def fedpara_register_methods(register):
        register(Method(name="mine", operands=2, combine=FEDPARA.combine, speed=1.0))

    with_plugin(fedpara_register_methods=fedpara_register_methods)
    assert "mine" in plugins.methods()


def test_duplicates_name_both_plugins(with_plugin):
    @hookimpl
    def fedpara_register_methods(register):
        register(FEDPARA)

    with_plugin(fedpara_register_methods=fedpara_register_methods)
    with pytest.raises(
        PluginError, match=r"'fedpara' .*'builtins'.*'thirdparty'|'thirdparty'.*'builtins'"
    ):
        plugins.methods()


def test_misspelt_hooks_fail(with_plugin):
    @hookimpl
    def fedpara_register_metods(register):
        pass

    with_plugin(fedpara_register_metods=fedpara_register_metods)
    with pytest.raises(PluginError, match="fedpara_register_methods"):
        plugins.methods()


def test_plugins_can_be_disabled(with_plugin, monkeypatch):
    @hookimpl
    def fedpara_register_methods(register):
        register(FEDPARA)

    monkeypatch.setenv(registry.DISABLE_VARIABLE, "other, thirdparty")
    with_plugin(fedpara_register_methods=fedpara_register_methods)
    assert plugins.methods()["fedpara"] is FEDPARA


def test_unknown_method_lists_the_known():
    with pytest.raises(ConfigError, match="none, lowrank, fedpara, pfedpara"):
        plugins.method_named("nothing")
    assert plugins.method_named("none") is None


def test_importing_the_core_imports_no_framework():
    code = (
        "import sys, torch; before = set(sys.modules); import fedpara_plugins;"
        "heavy = {'flwr', 'fedml', 'matplotlib', 'sklearn', 'ray', 'transformers'};"
        "assert not heavy & {name.split('.')[0] for name in set(sys.modules) - before}"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
