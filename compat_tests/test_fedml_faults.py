"""Every fault in docs/fedml-faults.md is still there; when one is repaired, its mend can go."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="needs FedML 0.9.6")

from harness.cells.environments import selection

DOCS = Path(__file__).parents[1] / "docs"
FOLDER = DOCS / "fedml_faults"
PAGE = (DOCS / "fedml-faults.md").read_text(encoding="utf-8")


def _reproductions() -> Iterator[Any]:
    sys.path.insert(0, str(FOLDER))
    # `small` is what they share. `hang` starts three real processes and waits for them, minutes on
    # a busy machine; it bounds that itself. The smoke part has no time for it.
    left_out = {"small.py"} if selection() == "all" else {"small.py", "hang.py"}
    for path in sorted(path for path in FOLDER.glob("*.py") if path.name not in left_out):
        spec = importlib.util.spec_from_file_location(f"fault_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        for reproduce in module.REPRODUCTIONS:
            yield pytest.param(reproduce, id=f"{path.stem}-{reproduce.__name__}")


FAULTS = list(_reproductions())


@pytest.mark.parametrize("reproduce", FAULTS)
def test_upstream_still_has_the_fault(reproduce: Callable[[], Any]) -> None:
    fault = reproduce()
    assert fault.present, (
        f"upstream fixed: drop the mend of {reproduce.__name__} and its row in "
        f"docs/fedml-faults.md. FedML now: {fault.found}; right: {fault.right}"
    )


def test_the_page_names_every_reproduction_and_no_other() -> None:
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+){1,})`", PAGE))
    functions = {str(fault.id).split("-", 1)[1] for fault in FAULTS} | {"one_exception_hangs_all"}
    others = {"initialize_all_clients", "get_model_params", "set_id", "learning_rate"}
    assert functions - named == set()
    assert named - functions - others == set()
