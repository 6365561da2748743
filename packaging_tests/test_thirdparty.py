"""A third party's distribution adds a kind of layer: installed for real, found by itself."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent

USE = """
import torch
from torch import nn
import fedpara_plugins as fedpara
model = fedpara.convert(nn.Sequential(nn.Bilinear(48, 40, 24)), method="fedpara", gamma=0.2)
assert type(model[0]).__name__ == "FactorisedBilinear", model
a, b = torch.randn(3, 48), torch.randn(3, 40)
"""

CONTRACT = """
import torch
from torch import nn
from fedpara_plugins.testing import LayerContract

class TestBilinear(LayerContract):
    dense_class = nn.Bilinear

    def cases(self):
        return [(nn.Bilinear(48, 24, 40), (torch.randn(5, 48), torch.randn(5, 24)))]
"""


@pytest.fixture
def site(tmp_path):
    """Install the core into a folder, and return it with a function that installs more there."""
    target = tmp_path / "site"

    def install(source):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade"]
        command += ["--no-build-isolation", "--target", str(target), str(source)]
        subprocess.run(command, check=True, capture_output=True)

    install(ROOT)
    return target, install


def run(target, *arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        env={"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=target,
    )


def changed(tmp_path, **replacements):
    """Copy the third party's folder under another name, with some text replaced."""
    copy = tmp_path / "other"
    shutil.copytree(HERE / "thirdparty", copy)
    for name in ("pyproject.toml", "fedpara_bilinear.py"):
        text = (copy / name).read_text()
        for old, new in {"fedpara_bilinear": "other", **replacements}.items():
            text = text.replace(old, new)
        (copy / name).write_text(text)
    text = (copy / "pyproject.toml").read_text()
    text = text.replace("fedpara-bilinear", "other").replace("bilinear =", "other =")
    (copy / "pyproject.toml").write_text(text)
    (copy / "fedpara_bilinear.py").rename(copy / "other.py")
    return copy


def test_is_picked_up_and_fulfils_the_contract(site):
    target, install = site
    assert "no layer of the model" in run(target, "-c", USE).stderr
    install(HERE / "thirdparty")
    assert run(target, "-c", USE).stderr == ""
    (target / "test_bilinear.py").write_text(CONTRACT)
    result = run(target, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_bilinear.py")
    assert result.returncode == 0, result.stdout


def test_a_second_plugin_for_the_same_layer_fails_loudly(site, tmp_path):
    target, install = site
    install(HERE / "thirdparty")
    install(changed(tmp_path))
    error = run(target, "-c", USE).stderr
    assert "PluginError" in error
    assert "Bilinear" in error
    assert "'bilinear'" in error
    assert "'other'" in error


def test_a_misspelt_hook_fails_loudly(site, tmp_path):
    target, install = site
    install(changed(tmp_path, fedpara_register_layers="fedpara_register_layer"))
    error = run(target, "-c", USE).stderr
    assert "PluginError" in error
    assert "fedpara_register_layers" in error
