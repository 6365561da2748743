"""What the documentation shows is run, and its links lead somewhere."""

import doctest
import random
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import PayloadError, convert
from fedpara_plugins.codecs import decode_payload, encode_payload, parse_codec
from fedpara_plugins.plugins import stages
from fedpara_plugins.testing.hostile import check_refusal, damaged

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# What `exchange` offers to the adapters is described as a whole.
FACES = ["", "codecs", "ledger", "models", "training", "support"]
FACES += ["optimizers", "references", "plugins", "testing"]


def test_the_readme_s_plain_pytorch_example_runs():
    section = (ROOT / "README.md").read_text().split("## In plain PyTorch")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    names = {}
    exec(code, names)
    plain = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    plain.load_state_dict(names["dense"].state_dict(), strict=True)
    x = torch.randn(3, 784)
    torch.testing.assert_close(plain(x), names["model"](x), rtol=1e-4, atol=1e-5)


def test_the_stage_that_docs_codecs_shows_works_and_refuses_what_is_forged():
    section = (ROOT / "docs" / "codecs.md").read_text().split("## A stage of your own")[1]
    names, registered = {}, []
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1), names)
    names["fedpara_register_stages"](registered.append)
    known = {**stages(), "sign": registered[0]}
    values = {"w": torch.tensor([[1.0, -2.0], [0.0, 5.0]]), "n": torch.tensor([3, 4])}
    zeros = {name: torch.zeros_like(value) for name, value in values.items()}
    codec = parse_codec("delta+sign+zlib", known)
    data = encode_payload(values, codec=codec, reference=zeros)
    options = {"reference": zeros, "limit": 32, "stages": known}
    back = decode_payload(data, **options).tensors
    assert back["w"].tolist() == [[2, -2], [0, 2]]
    assert back["n"].tolist() == [3, 4]
    draw, refused = random.Random(0), 0
    for _ in range(1000):
        try:
            decode_payload(damaged(data, draw), **options)
        except PayloadError as error:
            check_refusal(error)
            refused += 1
    assert 500 < refused < 1000


def test_docstring_examples():
    attempted = 0
    for name in ("models.conversion", "layers.kept_weights", "training.label_counts"):
        module = import_module(f"fedpara_plugins.{name}")
        results = doctest.testmod(module, extraglobs={"nn": nn, "torch": torch, "convert": convert})
        attempted += results.attempted
        assert results.failed == 0
    assert attempted >= 9


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
        found = page.parent / target if target else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}#{anchor}"


def anchors(page):
    """Return the anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("face", FACES)
def test_every_public_name_is_documented(face):
    module = import_module(f"fedpara_plugins.{face}".rstrip("."))
    text = (ROOT / "docs" / "api.md").read_text()
    section = text.split(f"\n## `{module.__name__}`\n")[1].split("\n## ")[0]
    assert [name for name in module.__all__ if f"`{name}`" not in section] == []


def test_every_option_is_documented():
    text = (ROOT / "docs" / "flower.md").read_text()
    for name in fedpara.FedParaConfig.__dataclass_fields__:
        assert f"`{name.replace('_', '-')}`" in text
