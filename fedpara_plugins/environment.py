"""The installation: versions against requirements, plugins, adapters with their frameworks.

Nothing is imported that the user has not: frameworks are looked up, never loaded.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import (
    EntryPoint,
    PackageNotFoundError,
    entry_points,
    metadata,
    requires,
    version,
)
from typing import Literal

from fedpara_plugins._version import __version__
from fedpara_plugins.errors import PluginError
from fedpara_plugins.fast import native
from fedpara_plugins.plugins import ENTRY_POINT_GROUP, Adapter, adapters, layers, leave_out_broken
from fedpara_plugins.plugins.registry import DISABLE_VARIABLE

__all__ = ["Finding", "check_environment", "satisfies"]

DISTRIBUTION = "fedpara-plugins"
OPTIONAL = {"transformers": "its Conv1D layers (GPT-2) can be factorised"}
"""Packages that this one can make use of and never requires."""

Level = Literal["ok", "note", "attention"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's answer.

    Attributes:
        level: ``ok``; ``note`` for what is as it should be and worth knowing; ``attention`` for
            what should be changed.
        subject: what was looked at.
        text: what was found, and what to do about it.
    """

    level: Level
    subject: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<9}  {self.subject}: {self.text}"


def check_environment() -> list[Finding]:
    """Versions against requirements, plugins, adapters with their frameworks, optional packages.

    A plugin that cannot be loaded is a finding, and is left out in this process from here on.
    """
    return [*_own_requirements(), *_plugins(), *_optional()]


def _own_requirements() -> Iterator[Finding]:
    try:
        needed, python = requires(DISTRIBUTION) or [], metadata(DISTRIBUTION)["Requires-Python"]
    except PackageNotFoundError:
        yield Finding(
            "note",
            DISTRIBUTION,
            f"{__version__}, run from a folder and not installed: requirements are not known",
        )
        needed, python = ["torch", "numpy", "safetensors", "pluggy"], ""
    else:
        yield Finding("ok", DISTRIBUTION, __version__)
    yield _compared("python", platform.python_version(), python or "")
    for requirement in needed:
        name, wanted, condition = _parsed(requirement)
        if "extra" not in condition:
            yield _installed(name, wanted)


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
    name, wanted, _ = _parsed(adapter.requires)
    yield replace(_installed(name, wanted), subject=f"adapter {adapter.name}: {name}")
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
    kernels = native.found()
    yield Finding(kernels.level, f"optional {DISTRIBUTION}-kernels", kernels.text)


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _installed(name: str, wanted: str) -> Finding:
    try:
        return _compared(name, version(name), wanted)
    except PackageNotFoundError:
        return Finding("attention", name, f"not installed: pip install '{name}{wanted}'")


def _compared(name: str, found: str, wanted: str) -> Finding:
    if satisfies(found, wanted):
        return Finding("ok", name, f"{found} (needs {wanted})" if wanted else found)
    remedy = "use another interpreter" if name == "python" else f"pip install '{name}{wanted}'"
    return Finding("attention", name, f"{found} does not fit {wanted}: {remedy}")


def _parsed(requirement: str) -> tuple[str, str, str]:
    """Name, version range and condition of a requirement, such as ``numpy>=1.26; extra == 'x'``."""
    text, _, condition = requirement.partition(";")
    name = re.split(r"[^A-Za-z0-9._-]", text.strip(), maxsplit=1)[0]
    wanted = re.search(r"[<>=!~].*", text)
    return name, wanted[0].strip(" )") if wanted else "", condition


def satisfies(found: str, wanted: str) -> bool:
    """Whether a version lies in a range such as ``>=1.26,<2`` or ``==0.9.6``.

    Numbers only: a suffix such as ``rc1`` or ``+cpu`` counts for nothing. An operator that is not
    known here is taken as met.
    """
    for part in filter(None, (part.strip() for part in wanted.split(","))):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)\s*(.+)", part)
        if match is None:
            continue
        have, limit = _numbers(found), _numbers(match[2])
        length = max(len(have), len(limit))
        have, limit = (v + (0,) * (length - len(v)) for v in (have, limit))
        holds = {
            ">=": have >= limit,
            "<=": have <= limit,
            "==": have == limit,
            "!=": have != limit,
            "<": have < limit,
            ">": have > limit,
        }
        if not holds[match[1]]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    release = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(int(part) for part in release[0].split(".")) if release else ()
