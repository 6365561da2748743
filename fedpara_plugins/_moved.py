"""Module paths and names of 0.1 that have changed: they still work, with a DeprecationWarning.

A finder returns the module itself that stands at the new path. Classes, pickles and monkeypatches
are therefore the same under both paths. The tables are to be removed in the release after next.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["new_path", "serve_old_names", "serve_old_paths"]

_ROOT = "fedpara_plugins."

_MOVED = {
    "bound": "models.wrapped",
    "carried": "cli.training_settings",
    "checkpoints": "models.checkpoints",
    "codecs.cast": "stages.cast",
    "codecs.checks": "stages.checks",
    "codecs.delta": "stages.delta",
    "codecs.entropy_ans": "stages.entropy_ans",
    "codecs.entropy_decoders": "stages.entropy_decoders",
    "codecs.entropy_layout": "stages.entropy_layout",
    "codecs.entropy_zlib": "stages.entropy_zlib",
    "codecs.entropy_zstd": "stages.entropy_zstd",
    "codecs.grid": "stages.grid",
    "codecs.int8": "stages.int8",
    "codecs.options": "stages.options",
    "codecs.planes": "stages.planes",
    "codecs.quantise": "stages.quantise",
    "codecs.quantise_notes": "stages.quantise_notes",
    "codecs.quantise_steps": "stages.quantise_steps",
    "codecs.quantise_symbols": "stages.quantise_symbols",
    "codecs.rans": "stages.rans",
    "codecs.stage": "stages.stage",
    "codecs.strict_json": "codecs.json_reader",
    "codecs.topk": "stages.topk",
    "compose": "factors.compose",
    "convert": "models.conversion",
    "decay": "training.decay",
    "doctor": "cli.doctor",
    "environment": "cli.environment",
    "export": "cli.export",
    "factories": "cli.user_code",
    "fast": "factors.fast",
    "fit": "factors.fit",
    "freshness": "models.looks_trained",
    "heads": "models.head",
    "initialise": "factors.initialise",
    "inspector": "cli.inspect_file",
    "jacobian": "training.jacobian",
    "ledger.lines": "ledger.records",
    "methods": "factors.methods",
    "once": "layers.kept_weights",
    "optimizer_check": "training.optimizer_check",
    "own_state": "models.private",
    "plan": "factors.plan",
    "planner": "cli.plan",
    "projection": "factors.projection",
    "ranks": "factors.ranks",
    "reach": "factors.ratio_check",
    "replacing": "models.surgery",
    "report": "models.model_report",
    "saturation": "factors.tanh",
    "soundness": "models.weight_checks",
    "spec": "models.spec",
    "split": "models.state_split",
    "step_cost": "cli.step_cost",
    "step_parts": "cli.step_parts",
    "storage": "support.storage",
    "traffic": "ledger.page",
    "units": "support.units",
}
"""Old module or package to new one, both below ``fedpara_plugins``."""


def new_path(old: str) -> str | None:
    """Return the new path of an absolute module path; None if it has not moved."""
    if not old.startswith(_ROOT):
        return None
    name = old.removeprefix(_ROOT)
    if name in _MOVED:
        return _ROOT + _MOVED[name]
    package, _, rest = name.partition(".")
    return f"{_ROOT}{_MOVED[package]}.{rest}" if rest and package in _MOVED else None


def serve_old_paths() -> None:
    """Let imports of old paths find the new modules."""
    if not any(isinstance(finder, _OldPaths) for finder in sys.meta_path):
        # It comes first: the ordinary finder would load second copies of modules in moved packages.
        sys.meta_path.insert(0, _OldPaths())


class _OldPaths(MetaPathFinder, Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if new_path(fullname) else None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = new_path(old)
        assert new is not None
        warnings.warn(
            f"{old} has moved to {new}: import from there, or from a public face (docs/api.md)",
            DeprecationWarning,
            stacklevel=2,
        )
        sys.modules[old] = import_module(new)


def serve_old_names(module: str, renamed: Mapping[str, str]) -> Callable[[str], object]:
    """Return a ``__getattr__`` that lets old names of a module's contents find the new ones.

    Args:
        module: the module's name.
        renamed: old names to new ones.
    """

    def old_name(name: str) -> object:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"{module}.{name} has been renamed {renamed[name]}", DeprecationWarning, stacklevel=2
        )
        return getattr(sys.modules[module], renamed[name])

    return old_name
