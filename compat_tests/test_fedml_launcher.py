"""A project without any edit, started by the plugin's launcher in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
import yaml
from safetensors.torch import load_file

from harness.fedml.project import DEFAULTS, run
from harness.matrix.smoke import matrix_only

HERE = Path(__file__).parent

LOADERS = """
import fedml, sys
sys.path.insert(0, {harness!r})
from harness.fedml import project
fedml.data.load = lambda args: (project.dataset(), 4)
fedml.model.create = lambda args, output_dim: project.model()
fedml.device.get_device = lambda args: __import__("torch").device("cpu")
init = fedml.init
fedml.init = lambda *a, **k: init(*a, **{{**k, "check_env": False, "should_init_logs": False}})
"""

ONE_LINE = """
if __name__ == "__main__":
    fedml.run_simulation()
"""

FIVE_LINES = """
from fedml import FedMLRunner

if __name__ == "__main__":
    args = fedml.init()
    dataset, output_dim = fedml.data.load(args)
    model = fedml.model.create(args, output_dim)
    FedMLRunner(args, fedml.device.get_device(args), dataset, model).run()
"""


def start(folder: Path, script: str, plugin: bool, **keys: Any) -> subprocess.CompletedProcess[str]:
    common = {**DEFAULTS}
    sections = {"common_args": {"training_type": common.pop("training_type")}, "train_args": common}
    sections["fedpara_args"] = keys
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    (folder / "main.py").write_text(LOADERS.format(harness=str(HERE)) + script)
    launcher = ["-m", "fedpara_plugins_fedml"] if plugin else []
    return subprocess.run(
        [sys.executable, *launcher, "main.py", "--cf", "config.yaml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    "script",
    [matrix_only(ONE_LINE, reason="FedML calls the same runner"), FIVE_LINES],
    ids=["one line", "five lines"],
)
def test_a_project_runs_with_the_plugin_and_without_an_edit(tmp_path: Path, script: str) -> None:
    path = tmp_path / "out.safetensors"
    keys = {"fedpara_method": "fedpara", "fedpara_gamma": 0.5, "fedpara_checkpoint": str(path)}
    ended = start(tmp_path, script, plugin=True, **keys)
    assert ended.returncode == 0, ended.stderr
    wanted = tmp_path / "wanted.safetensors"
    run(**{**keys, "fedpara_checkpoint": str(wanted)})
    found, expected = load_file(path), load_file(wanted)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def test_an_error_is_told_in_the_user_s_terms_and_the_process_ends(tmp_path: Path) -> None:
    ended = start(tmp_path, ONE_LINE, plugin=True, fedpara_metod="fedpara")
    assert ended.returncode != 0
    last = ended.stderr.strip().splitlines()[-1]
    assert "unknown key fedpara_metod in the YAML; did you mean fedpara_method?" in last


def test_without_a_script_it_says_how_it_is_used(tmp_path: Path) -> None:
    for arguments, status in (([], 2), (["--help"], 0), (["missing.py"], 2)):
        ended = subprocess.run(
            [sys.executable, "-m", "fedpara_plugins_fedml", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ended.returncode == status
        assert ("usage: python -m fedpara_plugins_fedml" in ended.stderr) == (
            arguments != ["missing.py"]
        )
    assert "there is no file missing.py" in ended.stderr
