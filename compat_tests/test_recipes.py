"""The fine-tuning apps in ``examples/``, run with and without the plugin's diff."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.flower.apps import Outcome, federate
from harness.flower.recipes import recipe


def run(name: str, folder: Path, *, plugin: bool = True, **config: Any) -> Outcome:
    folder = folder / f"{name}-{plugin}-{len(list(folder.iterdir()))}"
    folder.mkdir()
    with recipe(name, folder, plugin=plugin) as (apps, own):
        torch.manual_seed(0)
        return federate(apps, own | config)


def test_the_adapter_of_a_language_model_is_averaged_as_without_the_plugin(tmp_path: Path) -> None:
    small = {"num-server-rounds": 2, "max-steps": 2}
    plain = run("flower_llm", tmp_path, plugin=False, **small)
    coded = run("flower_llm", tmp_path, **small, **{"fedpara.codec": "lossless"})
    assert plain.state.keys() == coded.state.keys()
    assert all("lora_" in name for name in plain.state)
    for name, value in plain.state.items():
        assert torch.equal(coded.state[name], value), name


def test_what_the_codec_saves_of_an_adapter(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    plain = run("flower_llm", tmp_path, plugin=False)
    coded = run("flower_llm", tmp_path, **{"fedpara.ledger": str(ledger)})
    sent, before = (sum(s.array_bytes for s in o.sent) for o in (coded, plain))
    print(before / sent, [json.loads(x) for x in ledger.read_text().splitlines()][:3])
    assert sent < before / 4
