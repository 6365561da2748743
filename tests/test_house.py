"""The layout of the repository, as far as import-linter cannot hold it."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "fedpara_plugins": ROOT / "fedpara_plugins",
    "fedpara_plugins_flower": ROOT / "adapters" / "flower" / "fedpara_plugins_flower",
    "fedpara_plugins_fedml": ROOT / "adapters" / "fedml" / "fedpara_plugins_fedml",
    "harness": ROOT / "compat_tests" / "harness",
}
CORE_ROOT = {
    *("__init__.py", "_moved.py", "_version.py", "config.py", "errors.py", "py.typed", "text.py"),
    *("cli", "codecs", "exchange", "factors", "layers", "ledger", "models", "optimizers"),
    *("plugins", "references", "stages", "support", "testing", "training"),
}
PUBLIC_ROOMS = (
    *("codecs", "exchange", "ledger", "models", "optimizers", "plugins", "references", "support"),
    *("testing", "training"),
)
FACES = ("fedpara_plugins", *(f"fedpara_plugins.{room}" for room in PUBLIC_ROOMS))
NOT_A_VERB = """
a after all an and another any as at because before between both by each either every few for from
half he her here his how if in into is it its just last least less main many mean more most much
neither next no nobody none nor not nothing of on once one only or other otherwise our over own same
several she so some something such that the their them then there these they this those to too two
under until up user via we what whatever when where whether which while who whoever whole whose why
with without yes you your function constructor
"""
ENDS_IN_S = """
access address bias compress cross decompress express focus guess pass press process
"""
"""Verbs whose imperative ends in s. Other first words that do are plurals, or third person."""


def rooms() -> list[str]:
    """List the folders that hold modules, by dotted name; a package's root is one too."""
    found = []
    for package, folder in PACKAGES.items():
        for init in sorted(folder.rglob("__init__.py")):
            found.append(".".join([package, *init.parent.relative_to(folder).parts]))
    return found


def modules_of(room: str) -> list[Path]:
    """List the modules that stand in a room itself."""
    package, *parts = room.split(".")
    return sorted(PACKAGES[package].joinpath(*parts).glob("*.py"))


def imperative(docstring: str) -> bool:
    """Tell whether a docstring may begin with an imperative verb."""
    first = re.match(r"[A-Z][a-z-]*\b", docstring)
    if first is None:
        return False
    word = first[0].lower()
    return word not in NOT_A_VERB.split() and (not word.endswith("s") or word in ENDS_IN_S.split())


def is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Tell whether a function is read like an attribute: a noun describes it."""
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def not_imperative(room: str) -> list[str]:
    """List functions of a room whose docstring does not begin with an imperative verb."""
    found = []
    for path in modules_of(room):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                said = ast.get_docstring(node)
                if said is not None and not is_property(node) and not imperative(said):
                    found.append(f"{path.name}:{node.lineno} {node.name}: {said.splitlines()[0]}")
    return found


def sentences(docstring: str) -> int:
    """Count the sentences of a docstring."""
    return len(re.findall(r"[.](?=\s|$)", docstring))


def test_the_root_of_the_core_holds_its_face_a_few_modules_and_rooms() -> None:
    held = {path.name for path in PACKAGES["fedpara_plugins"].iterdir()}
    assert held - {"__pycache__"} == CORE_ROOT


@pytest.mark.parametrize("room", rooms())
def test_a_room_says_what_it_is_for(room: str) -> None:
    init = next(path for path in modules_of(room) if path.name == "__init__.py")
    said = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
    assert said is not None
    assert sentences(said) >= 2, f"{init}: what is it for, what may it import, what does it offer?"


@pytest.mark.parametrize("face", FACES)
def test_a_face_names_what_it_offers(face: str) -> None:
    module = importlib.import_module(face)
    assert module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [name for name in module.__all__ if not hasattr(module, name)]


@pytest.mark.parametrize("room", rooms())
def test_docstrings_of_functions_begin_with_an_imperative_verb(room: str) -> None:
    assert not_imperative(room) == []


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the rank.", True),
        ("Compress.", True),
        ("Re-encode what was lost.", True),
        ("Returns the rank.", False),
        ("The rank.", False),
        ("Whether it is.", False),
        ("Bytes of all tensors.", False),
        ("``rank`` of a layer.", False),
        ("return the rank.", False),
        ("", False),
    ],
)
def test_what_counts_as_imperative(docstring: str, expected: bool) -> None:
    assert imperative(docstring) == expected
