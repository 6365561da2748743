"""The fine-tuning apps in ``examples/``, run with and without the plugin's diff."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from fedpara_plugins import FedParaError
from harness.flower.apps import Outcome, federate
from harness.flower.part_apps import PARTS, Part, part_apps
from harness.flower.recipes import recipe
from harness.flower.tuning_apps import TUNING, tuning_apps


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
    lines = [json.loads(line) for line in ledger.read_text().splitlines()]
    layers = {x["layer"].rpartition(".")[2] for x in lines if x.get("line") == "layer"}
    assert layers == {"lora_A", "lora_B"}
    print(f"flower_llm: {before / sent:.1f} times fewer bytes")
    assert sent < before / 6


TUNED = {
    "flower_lightning": {"num-server-rounds": 3},
    "flower_trainer": {"num-server-rounds": 2, "max-steps": 40},
}
"""Apps with the residual form, in small."""


@pytest.mark.parametrize("name", TUNED)
def test_the_update_of_a_trained_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / "dense.safetensors"
    plain = run(name, tmp_path, plugin=False, **TUNED[name])
    coded = run(name, tmp_path, **TUNED[name], **{"fedpara.checkpoint": str(path)})
    assert {n for n in coded.state if n.endswith("_base")}
    sent, before = (sum(s.array_bytes for s in o.sent) for o in (coded, plain))
    print(f"{name}: {before / sent:.1f} times fewer bytes, {plain.accuracies}, {coded.accuracies}")
    assert sent < before / 40
    assert all(v.abs().sum() > 0 for n, v in coded.state.items() if n.endswith(".x1"))
    assert coded.accuracies[0] == plain.accuracies[0]
    assert coded.accuracies[-1] > coded.accuracies[0] + 0.2
    dense = load_file(path)
    assert {n: v.shape for n, v in dense.items()} == {n: v.shape for n, v in plain.state.items()}


def test_a_saved_transformer_is_an_ordinary_one(tmp_path: Path) -> None:
    saved, path = tmp_path / "saved", tmp_path / "dense.safetensors"
    small = {"num-server-rounds": 1, "max-steps": 2, "save-path": str(saved)}
    run("flower_trainer", tmp_path, **small, **{"fedpara.checkpoint": str(path)})
    found = transformers.AutoModelForImageClassification.from_pretrained(saved).state_dict()
    torch.testing.assert_close(dict(found), load_file(path))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_below_the_adapter(bits: int, tmp_path: Path) -> None:
    """As in FlowerTune: bitsandbytes' layers, checkpointed, and adapters on them."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: tox run -e core-loops")
    base = tmp_path / "base"
    with recipe("flower_llm", base) as _:
        models = importlib.import_module("llm_app.models")
        models._base("", 0).save_pretrained(base / "model")
    small = {"num-server-rounds": 2, "max-steps": 2, "quantization": bits,
             "model-name": str(base / "model")}  # fmt: skip
    plain = run("flower_llm", tmp_path, plugin=False, **small)
    coded = run("flower_llm", tmp_path, **small, **{"fedpara.codec": "lossless"})
    assert plain.state.keys() == coded.state.keys()
    for name, value in plain.state.items():
        assert value.abs().sum() > 0
        assert torch.equal(coded.state[name], value), name


def bitsandbytes_body() -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: tox run -e core-loops")
    return Quantised(bnb.nn.Linear4bit(32, 48, compute_dtype=torch.float32)).to("cpu")


def torchao_body() -> nn.Module:
    torchao = pytest.importorskip(
        "torchao.quantization", reason="needs torchao: tox run -e core-loops"
    )
    model = Quantised(nn.Linear(32, 48))
    torchao.quantize_(model.body, torchao.Int8WeightOnlyConfig())
    return model


class Quantised(nn.Module):
    """A body whose weights are no ordinary ones, and a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body.requires_grad_(False)
        self.heads = nn.Module()
        self.heads.hidden, self.heads.head = nn.Linear(48, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.heads.head(torch.relu(self.heads.hidden(self.body(x))))
        return out


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def factory() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return factory


@pytest.mark.parametrize("method", ["none", "lowrank", "pfedpara"])
@pytest.mark.parametrize("build", [bitsandbytes_body, torchao_body])
def test_a_head_over_a_quantised_body(build: Any, method: str) -> None:
    part = Part(seeded(build), PARTS["head"].records, PARTS["head"].load)
    options = {"method": method, "codec": "lossless", "rank": 4, "min_size": 0, "base": "frozen"}
    if build is torchao_body:
        options["exclude"] = "body"
    section = {f"fedpara.{key}": value for key, value in options.items()}
    coded, plain = federate(part_apps(part), section), federate(part_apps(part, plugin=False))
    if method == "none":
        assert coded.state.keys() == plain.state.keys()
        for name, value in plain.state.items():
            assert torch.equal(coded.state[name], value), name
    else:
        assert "head.weight_base" in coded.state
        assert coded.state["head.x1"].abs().sum() > 0


def test_adapters_of_different_ranks_are_refused_with_both(tmp_path: Path) -> None:
    small = {"num-server-rounds": 1, "max-steps": 1}
    words = "model has rank 4, the server's has rank 8"
    with recipe("flower_llm", tmp_path) as (apps, own), pytest.raises(FedParaError, match=words):
        federate(apps, own | small, client_config=own | small | {"lora-r": 4})


README = {"method": "fedpara", "gamma": 0.1, "codec": "balanced", "clip": 1.0, "private": ""}
"""The README's section, as it stands."""


def section(**options: Any) -> dict[str, Any]:
    return {f"fedpara.{key}": value for key, value in options.items()}


@pytest.mark.parametrize("name", TUNING)
def test_flowers_apps_for_fine_tuning_with_a_codec(name: str) -> None:
    coded = federate(tuning_apps(TUNING[name]), section(method="none", codec="lossless"))
    plain = federate(tuning_apps(TUNING[name], plugin=False))
    assert coded.losses == plain.losses
    assert coded.state.keys() == plain.state.keys()
    for key, value in plain.state.items():
        assert torch.equal(coded.state[key], value), key


@pytest.mark.parametrize("options", [README, {**README, "method": "pfedpara", "codec": "small"}])
@pytest.mark.parametrize("name", TUNING)
def test_flowers_apps_for_fine_tuning_with_a_method(name: str, options: dict[str, Any]) -> None:
    """The body computes what it did; the head alone is factorised, sent and trained."""
    seen: list[Tensor] = []
    app = TUNING[name]
    outcome = federate(tuning_apps(app, seen=seen, rounds=3), section(**options))
    body = app.features(app.factory(), torch.randn(app.batch, generator=_seeded(99))).detach()
    for found in seen:
        torch.testing.assert_close(found, body)
    dense = app.head(app.factory()).state_dict()
    factorised = {key.rpartition(".")[0] for key in outcome.state if key.endswith(".x1")}
    assert factorised
    assert {key.rpartition(".")[0] for key in outcome.state} == {
        key.rpartition(".")[0] for key in dense
    }
    assert outcome.losses[-1] < outcome.losses[0]


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
