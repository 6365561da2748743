"""What the documentation shows is run, and its links lead somewhere."""

import doctest
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import convert

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def test_the_readme_s_plain_pytorch_example_runs():
    section = (ROOT / "README.md").read_text().split("## In plain PyTorch")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    names = {}
    exec(code, names)
    plain = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10))
    plain.load_state_dict(names["dense"].state_dict(), strict=True)
    x = torch.randn(3, 784)
    torch.testing.assert_close(plain(x), names["model"](x), rtol=1e-4, atol=1e-5)


def test_docstring_examples():
    module = __import__("importlib").import_module("fedpara_plugins.convert")
    results = doctest.testmod(module, extraglobs={"nn": nn, "convert": convert})
    assert results.attempted >= 2
    assert results.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_option_is_documented():
    text = (ROOT / "docs" / "flower.md").read_text()
    for name in fedpara.FedParaConfig.__dataclass_fields__:
        assert f"`{name.replace('_', '-')}`" in text
