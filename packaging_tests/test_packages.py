"""The distributions as a user gets them: wheel contents, metadata, discovery after installing."""

import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = {
    "fedpara_plugins": ROOT,
    "fedpara_plugins_flower": ROOT / "adapters" / "flower",
    "fedpara_plugins_fedml": ROOT / "adapters" / "fedml",
    "fedpara_plugins_kernels": ROOT / "kernels",
}


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    for source in DISTRIBUTIONS.values():
        command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, source]
        subprocess.run(command, check=True, capture_output=True)
    return {path.name.split("-")[0]: path for path in folder.glob("*.whl")}


def metadata(wheel):
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_each_wheel_holds_its_own_package_only(wheels):
    assert set(wheels) == set(DISTRIBUTIONS)
    for name, wheel in wheels.items():
        with zipfile.ZipFile(wheel) as archive:
            tops = {n.split("/")[0] for n in archive.namelist() if ".dist-info/" not in n}
            assert tops == {name}
            assert f"{name}/py.typed" in archive.namelist()
            assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())


def test_versions_move_in_lockstep(wheels):
    assert len({metadata(wheel)["Version"] for wheel in wheels.values()}) == 1


def test_published_requirements_are_ranges(wheels):
    for wheel in wheels.values():
        for requirement in metadata(wheel).get_all("Requires-Dist") or []:
            assert re.search(r">=|<", requirement), requirement
            assert "==" not in requirement.split(";")[0], requirement


def test_extras_forward_to_the_other_distributions(wheels):
    requirements = metadata(wheels["fedpara_plugins"]).get_all("Requires-Dist")
    for extra in ("flower", "fedml", "kernels"):
        matching = [r for r in requirements if f'extra == "{extra}"' in r.replace("'", '"')]
        assert [r.startswith(f"fedpara-plugins-{extra}") for r in matching] == [True]


def test_installed_adapters_are_found_without_their_frameworks(wheels, tmp_path):
    """Neither flwr nor fedml is installed here, and the core finds both adapters all the same."""
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target]
    subprocess.run([*install, *wheels.values()], check=True)
    code = (
        "from fedpara_plugins.plugins import adapters; found = adapters();"
        "assert set(found) == {'flower', 'fedml'}, found;"
        "assert found['flower'].requires.startswith('flwr>=');"
        "assert found['fedml'].requires == 'fedml==0.9.6';"
        "import fedpara_plugins_fedml, fedpara_plugins as fp\n"
        "try: fedpara_plugins_fedml.FedMLRunner\n"
        "except fp.PluginError as error: assert 'fedml is not installed' in str(error)\n"
        "else: raise SystemExit('FedMLRunner is there without fedml')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr


def build_of_kernels(folder, **variables):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    return subprocess.run(
        [*command, "-w", folder, ROOT / "kernels"],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


def test_one_wheel_of_kernels_serves_every_python(wheels):
    tags = wheels["fedpara_plugins_kernels"].name.split("-", 2)[2]
    assert tags.startswith("py3-none-")
    assert "any" not in tags


def test_kernels_without_a_compiler_say_what_to_do(tmp_path):
    none = build_of_kernels(tmp_path, PATH=str(tmp_path), CXX="")
    assert none.returncode
    assert "no C++ compiler was found" in none.stderr
    assert "works without this package" in none.stderr
    wrong = build_of_kernels(tmp_path, CXX=f"{sys.executable} -c raise(SystemExit('too_old'))")
    assert wrong.returncode
    assert "too_old" in wrong.stderr
    assert "works without this package" in wrong.stderr
