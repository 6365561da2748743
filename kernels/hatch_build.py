"""Build hook that compiles kernels.cpp into the wheel.

The library has plain C functions, so that one wheel serves every version of Python.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = [
    "-O3", "-std=c++17", "-mavx2", "-mfma", "-fPIC", "-shared", "-fno-exceptions", "-fno-rtti",
    "-Wno-attributes", "-Wno-ignored-attributes",
]  # fmt: skip
COMPILERS = ("c++", "g++", "clang++")


class KernelsBuildHook(BuildHookInterface):  # type: ignore[type-arg,misc]
    """Build hook that adds the library to the package, and the platform to the wheel's tag."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile the library.

        Raises:
            RuntimeError: the processor is another one, there is no compiler, or the compiler fails.
        """
        machine = platform.machine().lower()
        if machine not in {"x86_64", "amd64"} or os.name != "posix":
            raise RuntimeError(
                f"fedpara-plugins-kernels is written for Linux and macOS on x86-64, this is "
                f"{platform.system()} on {machine}: leave it out, fedpara-plugins works without it"
            )
        library = Path(self.directory) / "kernels" / "_kernels.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        source = Path(self.root) / "kernels.cpp"
        command = [*_compiler(), *FLAGS, str(source), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(
                f"{shlex.join(command)} failed:\n{result.stderr}\nA C++17 compiler is needed (set "
                f"CXX to use another one); fedpara-plugins works without this package"
            )
        build_data["force_include"][str(library)] = "fedpara_plugins_kernels/_kernels.so"
        build_data["pure_python"] = False
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"


def _compiler() -> list[str]:
    own = os.environ.get("CXX")
    if own:
        return shlex.split(own)
    for name in COMPILERS:
        if found := shutil.which(name):
            return [found]
    raise RuntimeError(
        "no C++ compiler was found (c++, g++, clang++): install one (Debian: apt-get install g++) "
        "or set CXX to one; fedpara-plugins works without this package"
    )
