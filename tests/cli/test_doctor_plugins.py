"""``fedpara doctor`` where an installed plugin is broken: it says whose, and goes on."""

import re
import sys

import pytest

from fedpara_plugins import PluginError, plugins
from fedpara_plugins.cli import environment

HOOK = "from fedpara_plugins import hookimpl\n@hookimpl"
BREAKING = {
    "at its import": ("raise RuntimeError('no such device')\n", "RuntimeError: no such device"),
    "by ending Python": ("raise SystemExit(3)\n", "SystemExit: 3"),
    "when it registers": (
        f"{HOOK}\ndef fedpara_register_stages(register):\n    register(1 // 0)\n",
        "ZeroDivisionError",
    ),
    "by a wrong hook": (
        f"{HOOK}\ndef fedpara_register_stage(register):\n    pass\n",
        "fedpara_register_stages",
    ),
    "by a name that is taken": (
        f"from fedpara_plugins.factors.methods import FEDPARA\n{HOOK}(tryfirst=True)\n"
        f"def fedpara_register_methods(register):\n    register(FEDPARA)\n",
        "method 'fedpara' is registered twice",
    ),
}
"""A module that breaks in that way, and what has to be said of it."""

SOUND = f"""
from dataclasses import replace
from fedpara_plugins.factors.methods import FEDPARA
{HOOK}
def fedpara_register_methods(register):
    register(replace(FEDPARA, name="sound_method"))
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Put distributions with one plugin each on the path, as an installer would."""

    def install(name, text):
        about = tmp_path / f"my_{name}-2.5.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: my-{name}\nVersion: 2.5\n")
        (about / "entry_points.txt").write_text(f"[fedpara_plugins]\n{name} = plugin_of_{name}\n")
        (tmp_path / f"plugin_of_{name}.py").write_text(text)
        plugins.reload()

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    monkeypatch.undo()
    plugins.reload()
    for name in [name for name in sys.modules if name.startswith("plugin_of_")]:
        del sys.modules[name]


@pytest.mark.parametrize("how", BREAKING)
def test_a_broken_plugin_is_a_finding_and_the_rest_is_checked(installed, command, how):
    text, words = BREAKING[how]
    installed("broken", text)
    installed("sound", SOUND)
    with pytest.raises(PluginError, match="'broken'"):
        plugins.methods()  # a run must not go on without it
    code, out, err = command("doctor", "user_models:Net", "--method", "sound_method")
    assert (code, err) == (1, "")
    line = next(line for line in out.splitlines() if "plugin broken" in line)
    assert line.startswith("attention  plugin broken: ")
    assert words in line
    assert "FEDPARA_PLUGINS_DISABLE" in line
    assert "ok         plugin sound: my-sound 2.5" in out.splitlines()
    assert "optional transformers" in out
    assert re.search(
        r"^ok +head.weight: sound_method", out, re.M
    )  # the model, with the other plugin


def test_a_broken_plugin_can_be_left_out_by_its_name(installed, command, monkeypatch):
    installed("broken", BREAKING["at its import"][0])
    monkeypatch.setenv("FEDPARA_PLUGINS_DISABLE", "broken")
    assert "fedpara" in plugins.methods()
    _, out, _ = command("doctor")
    assert "note       plugin broken: left out, named in FEDPARA_PLUGINS_DISABLE" in out


def test_the_installation_is_described_before_the_model_needs_what_it_lacks(installed, command):
    installed("broken", BREAKING["at its import"][0])
    code, out, err = command("doctor", "user_models:Net", "--method", "of_the_broken_one")
    assert code == 2
    assert "RuntimeError: no such device" in out
    assert "of_the_broken_one" in err


def test_a_fault_that_is_no_plugins_alone_is_a_finding_too(monkeypatch, command):
    def failing():
        raise PluginError("the kind for other:Dense cannot be loaded")

    monkeypatch.setattr(environment, "layers", failing)
    code, out, _ = command("doctor")
    assert code == 1
    assert re.search(r"^attention +plugins: the kind for other:Dense", out, re.M)
