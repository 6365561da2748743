"""`fedpara doctor`: checks of the installation, its plugins and adapters.

It reads the versions of frameworks and optional packages from their metadata and never imports
them.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import (
    EntryPoint,
    PackageNotFoundError,
    entry_points,
    metadata,
    requires,
    version,
)

from fedpara_plugins._version import __version__
from fedpara_plugins.errors import PluginError
from fedpara_plugins.factors.fast.native_library import find_kernels
from fedpara_plugins.plugins import ENTRY_POINT_GROUP, Adapter, adapters, layers, leave_out_broken
from fedpara_plugins.plugins.registry import DISABLE_VARIABLE
from fedpara_plugins.support.findings import Finding, satisfies

__all__ = ["check_environment"]

DISTRIBUTION = "fedpara-plugins"
OPTIONAL = {"transformers": "its Conv1D layers (GPT-2) can be factorised"}
"""Packages that are used if they are installed, and what for."""


def check_environment() -> list[Finding]:
    """Check versions, plugins, adapters with their frameworks, and optional packages.

    A plugin that cannot be loaded is a finding; this process then works without it.
    """
    return [*_own_requirements(), *_plugins(), *_optional()]


def _own_requirements() -> Iterator[Finding]:
    try:
        needed, python = requires(DISTRIBUTION) or [], metadata(DISTRIBUTION)["Requires-Python"]
    except PackageNotFoundError:
        yield Finding(
            "note",
            DISTRIBUTION,
            f"{__version__}, not installed but run from a folder: its requirements are unknown",
        )
        needed, python = ["torch", "numpy", "safetensors", "pluggy"], ""
    else:
        yield Finding("ok", DISTRIBUTION, __version__)
    yield _check_version("python", platform.python_version(), python or "")
    for requirement in needed:
        name, wanted, condition = _parse_requirement(requirement)
        if "extra" not in condition:
            yield _check_package(name, wanted)


def _plugins() -> Iterator[Finding]:
    disabled = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")}
    found = sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda point: point.name)
    try:
        broken = leave_out_broken()
        active = adapters()
    except PluginError as error:
        yield Finding("attention", "plugins", str(error))
        broken, active = {}, {}
    for point in found:
        if point.name in disabled:
            yield Finding("note", f"plugin {point.name}", f"left out, named in {DISABLE_VARIABLE}")
        elif point.name in broken:
            yield Finding("attention", f"plugin {point.name}", broken[point.name])
        else:
            yield _plugin(point)
    try:
        layers()  # lazy kinds whose package has been imported are loaded here
    except PluginError as error:
        yield Finding("attention", "plugins", str(error))
    if not active:
        yield Finding(
            "note", "adapters", "none installed: pip install 'fedpara-plugins[flower]' for Flower"
        )
    for adapter in active.values():
        yield from _adapter(adapter)


def _plugin(point: EntryPoint) -> Finding:
    home = point.dist
    where = f"{home.metadata['Name']} {home.version}" if home is not None else point.value
    own = home is not None and home.metadata["Name"].startswith(f"{DISTRIBUTION}-")
    if own and home is not None and home.version != __version__:
        return Finding(
            "attention",
            f"plugin {point.name}",
            f"{where} beside {DISTRIBUTION} {__version__}: install the same version of both",
        )
    return Finding("ok", f"plugin {point.name}", where)


def _adapter(adapter: Adapter) -> Iterator[Finding]:
    name, wanted, _ = _parse_requirement(adapter.requires)
    yield replace(_check_package(name, wanted), subject=f"adapter {adapter.name}: {name}")
    if adapter.findings is not None and _is_installed(name):
        yield from adapter.findings()
    for lack in adapter.lacks:
        yield Finding("note", f"adapter {adapter.name}", f"lacks {lack}")


def _optional() -> Iterator[Finding]:
    for name, use in OPTIONAL.items():
        try:
            yield Finding("ok", f"optional {name}", f"{version(name)}: {use}")
        except PackageNotFoundError:
            yield Finding("note", f"optional {name}", f"not installed; with it, {use}")
    kernels = find_kernels()
    yield Finding(kernels.level, f"optional {DISTRIBUTION}-kernels", kernels.text)


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _check_package(name: str, wanted: str) -> Finding:
    try:
        return _check_version(name, version(name), wanted)
    except PackageNotFoundError:
        return Finding("attention", name, f"not installed: pip install '{name}{wanted}'")


def _check_version(name: str, found: str, wanted: str) -> Finding:
    if satisfies(found, wanted):
        return Finding("ok", name, f"{found} (needs {wanted})" if wanted else found)
    remedy = "use another interpreter" if name == "python" else f"pip install '{name}{wanted}'"
    return Finding("attention", name, f"{found} does not fit {wanted}: {remedy}")


def _parse_requirement(requirement: str) -> tuple[str, str, str]:
    """Return name, range and condition of a requirement such as ``numpy>=1.26; extra == 'x'``."""
    text, _, condition = requirement.partition(";")
    name = re.split(r"[^A-Za-z0-9._-]", text.strip(), maxsplit=1)[0]
    wanted = re.search(r"[<>=!~].*", text)
    return name, wanted[0].strip(" )") if wanted else "", condition
