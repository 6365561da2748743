"""Adapters of PEFT and the residual form, there and back, with the real library."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConversionError, MismatchError, PayloadError
from fedpara_plugins.cli.command import main
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.models import convert_peft, save_factors, save_peft

peft = pytest.importorskip("peft", reason="needs peft: tox run -e core-models")

ALIKE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """Layers that PEFT adapts, two of them with names that end alike."""

    def __init__(self, embedding=True):
        super().__init__()
        first = nn.Embedding(60, 24) if embedding else nn.Linear(24, 24)
        self.words = first
        self.block = nn.ModuleDict({"fc": nn.Linear(24, 32), "norm": nn.BatchNorm1d(32)})
        self.images = nn.Conv2d(8, 16, 3, padding=1, stride=2)
        self.point = nn.Conv2d(16, 32, 1)
        self.series = nn.Conv1d(32, 32, 5, padding=2)
        self.fc = nn.Linear(32, 24)
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 10)
        self.shift = nn.Parameter(torch.zeros(24))

    def forward(self, tokens, images):
        found = self.words(tokens).mean(1) + self.shift
        found = self.block["norm"](self.block["fc"](found))
        seen = self.point(self.images(images).relu()).flatten(2)
        found = found + self.series(seen).mean(2)
        return self.head(self.norm(self.fc(found.relu())))


def inputs(embedding=True):
    torch.manual_seed(5)
    tokens = torch.randint(0, 60, (6, 7)) if embedding else torch.randn(6, 7, 24)
    return tokens, torch.randn(6, 8, 9, 9)


def base(embedding=True):
    torch.manual_seed(0)
    net = Net(embedding)
    for _ in range(3):  # the norm's statistics are not those of a fresh one
        net(torch.randint(0, 60, (6, 7)) if embedding else torch.randn(6, 7, 24), inputs()[1])
    return net.eval()


def trained(net, method="lowrank", **options):
    """Return the net converted to the residual form, with everything moved that may move."""
    options = {"gamma": 0.2, "min_size": 0, "base": "frozen", "exclude": ["head"], **options}
    model = fedpara.convert(net, method=method, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    return model.eval()


def loaded(net, folder):
    return peft.PeftModel.from_pretrained(net, folder).eval()


# There


OPTIONS = {
    "lowrank": {"method": "lowrank"},
    "one-sided": {"method": "lowrank", "train": "right"},
    "with a core": {"method": "lowrank", "core": True},
    "ranks by layer": {
        "method": "lowrank",
        "rank": 3,
        "speed": 0.4,
        "overrides": {"fc": {"rank": 5}, "block.fc": {"speed": 0.9}, "images": {"rank": 2}},
    },
    "pfedpara": {"method": "pfedpara"},
    "fedpara": {"method": "fedpara"},
    "fedpara without a core": {"method": "fedpara", "core": False},
    "fedpara, ranks by layer": {
        "method": "fedpara",
        "rank": 3,
        "overrides": {"fc": {"rank": 5}, "series": {"rank": 4, "speed": 0.8}},
    },
}


@pytest.mark.parametrize("trainable", [("none",), ("head.*", "*norm*"), ("*",)])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_trained_model_is_an_adapter_with_the_same_outputs(name, trainable, tmp_path):
    embedding = not name.startswith("fedpara")
    net, x = base(embedding), inputs(embedding)
    before = copy.deepcopy(net.state_dict())
    model = trained(copy.deepcopy(net), trainable=trainable, **OPTIONS[name])
    expected = model(*x)
    assert not torch.allclose(expected, net(*x), rtol=0.05)
    save_peft(model, tmp_path / "adapter", private=True)
    adapter = loaded(copy.deepcopy(net), tmp_path / "adapter")
    torch.testing.assert_close(adapter(*x), expected, **ALIKE)
    torch.testing.assert_close(net.state_dict(), before)
    torch.testing.assert_close(adapter.merge_and_unload()(*x), expected, **ALIKE)
    dense = fedpara.to_dense(model)
    torch.testing.assert_close(dense(*x), expected, **ALIKE)


def test_what_is_saved_as_whole_modules(tmp_path):
    model = trained(base(), trainable=("head.*", "*norm*", "fc.bias", "shift"))
    config = save_peft(model, tmp_path).config
    # `norm` is the end of `block.norm` too, which PEFT would take for it.
    assert config["modules_to_save"] == ["block.norm", "head"]
    adapter = loaded(base(), tmp_path)
    saved = peft.get_peft_model_state_dict(adapter)
    assert "base_model.model.head.weight" in saved
    with adapter.disable_adapter():
        torch.testing.assert_close(adapter.base_model.model.head.weight, base().head.weight)


def test_the_shared_update_alone_leaves_the_private_one_on_the_device(tmp_path):
    net, x = base(), inputs()
    model = trained(copy.deepcopy(net), "pfedpara", private=("head.*",), trainable=("head.*",))
    save_peft(model, tmp_path / "shared")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, FactorisedLayer):
                for parameter in layer.private_parameters():
                    parameter.zero_()
        model.head.load_state_dict(net.head.state_dict())
    torch.testing.assert_close(loaded(net, tmp_path / "shared")(*x), model(*x), **ALIKE)


def test_the_command_writes_such_an_adapter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net, x = base(), inputs()
    model = trained(copy.deepcopy(net), trainable=("head.*",))
    save_factors(model, "factors.safetensors")
    monkeypatch.setattr("fedpara_plugins.cli.command.model_from", lambda text: base())
    assert main(["export", "factors.safetensors", "--peft", "adapter", "--model", "a:b"]) == 0
    torch.testing.assert_close(loaded(net, "adapter")(*x), model(*x), **ALIKE)


def test_training_goes_on_in_peft(tmp_path):
    """The same gradients, and the same steps of plain SGD."""
    net, x = base(), inputs()
    model = trained(copy.deepcopy(net), rank=4, core=False, trainable=("none",), clip="none")
    save_peft(model, tmp_path)
    adapter = peft.PeftModel.from_pretrained(net, tmp_path, is_trainable=True).eval()
    for some in (model, adapter):
        optimizer = torch.optim.SGD([p for p in some.parameters() if p.requires_grad], lr=0.05)
        for _ in range(5):
            optimizer.zero_grad()
            some(*x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(adapter(*x), model(*x), **ALIKE)


def test_gpt2_s_transposed_layers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    x = torch.arange(14).reshape(2, 7)
    include = ["*attn*", "*mlp*", "*.wpe"]
    model = trained(copy.deepcopy(net), include=include, exclude=[], trainable=("*ln_*",))
    expected = model(x).logits
    save_peft(model, tmp_path, base_model="gpt2")
    adapter = loaded(copy.deepcopy(net), tmp_path)
    torch.testing.assert_close(adapter(x).logits, expected, **ALIKE)
    torch.testing.assert_close(convert_peft(net, tmp_path).eval()(x).logits, expected, **ALIKE)
    assert peft.PeftConfig.from_pretrained(tmp_path).base_model_name_or_path == "gpt2"


def test_what_peft_has_no_adapter_of_is_refused(tmp_path):
    dilated = nn.Sequential(nn.Conv2d(8, 16, 3, dilation=2))
    grouped = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2))
    cases = [
        (dilated, {}, "ignores dilation"),
        (grouped, {}, "groups=2"),
        (nn.Sequential(nn.LSTM(24, 24)), {}, "no single weight"),
        (nn.Sequential(nn.MultiheadAttention(24, 4)), {}, "no single weight"),
        (nn.Sequential(nn.ConvTranspose2d(8, 16, 3)), {}, "no layer of this kind"),
        (nn.Sequential(nn.Embedding(60, 24)), {"method": "fedpara"}, "no layer of this kind"),
        (nn.Linear(24, 24), {}, "a single layer"),
        (nn.Sequential(nn.Linear(24, 24)), {"tanh": True}, "tanh"),
        (nn.Sequential(nn.Linear(24, 24)), {"base": "factors"}, "base='frozen'"),
        (
            nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24)),
            {"overrides": {"1": {"method": "fedpara"}}},
            "one kind",
        ),
    ]  # fmt: skip
    for net, options, reason in cases:
        model = trained(net, **{"exclude": [], "rank": 2, **options})
        with pytest.raises(ConversionError, match=reason):
            save_peft(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()


def test_a_grouped_convolution_of_loha(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 16, 3, groups=2, dilation=2)).eval()
    x = torch.randn(2, 16, 9, 9)
    model = trained(copy.deepcopy(net), "fedpara", rank=2, exclude=[])
    save_peft(model, tmp_path)
    torch.testing.assert_close(loaded(net, tmp_path)(x), model(x), **ALIKE)


# Back


LAYERS = ["words", "block.fc", "images", "point", "series", "fc"]
RANKS = {"rank_pattern": {"block.fc": 3, "images": 5}, "alpha_pattern": {"series": 1, "^fc": 24}}
LORAS = {
    "lora": {},
    "ranks and alphas": RANKS,
    "rslora": {"use_rslora": True, **RANKS},
    "saved": {"modules_to_save": ["head", "block.norm"]},
    "biases": {"bias": "all"},
}
LOHAS = {
    "loha": {},
    "effective": {"use_effective_conv2d": True},
    "ranks and alphas": RANKS,
    "ranks, effective": {"use_effective_conv2d": True, **RANKS},
    "saved": {"modules_to_save": ["head"]},
}


def adapters():
    for name, options in LORAS.items():
        yield pytest.param(
            lambda options=options: peft.LoraConfig(
                r=4, lora_alpha=7, target_modules=LAYERS, init_lora_weights=False, **options
            ),
            id=f"lora, {name}",
        )
    for name, options in LOHAS.items():
        yield pytest.param(
            lambda options=options: peft.LoHaConfig(
                r=4, alpha=7, target_modules=LAYERS[1:], init_weights=False, **options
            ),
            id=f"loha, {name}",
        )


@pytest.mark.parametrize("config", [*adapters()])
def test_an_adapter_is_a_model_with_the_same_outputs(config, tmp_path):
    net, x = base(), inputs()
    torch.manual_seed(3)
    adapter = peft.get_peft_model(copy.deepcopy(net), config()).eval()
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if parameter.requires_grad:  # small: products of four factors grow quickly
                parameter.mul_(0.5 if "hada" in name else 1.0).add_(0.01)
    expected = adapter(*x)
    adapter.save_pretrained(tmp_path / "theirs")
    model = convert_peft(copy.deepcopy(net), tmp_path / "theirs").eval()
    torch.testing.assert_close(model(*x), expected, **ALIKE)
    assert not torch.allclose(expected, net(*x), rtol=0.05)
    factorised = {n for n, layer in model.named_modules() if isinstance(layer, FactorisedLayer)}
    theirs = adapter.base_model.model.named_modules()
    assert factorised == {n for n, layer in theirs if hasattr(layer, "base_layer")}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert ("head.weight" in trainable) is ("head" in (config().modules_to_save or ()))
    assert all(n in trainable for n, _ in model.named_parameters() if n.endswith((".x1", ".y2")))
    # And back again.
    save_peft(model, tmp_path / "ours")
    torch.testing.assert_close(loaded(net, tmp_path / "ours")(*x), expected, **ALIKE)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (lambda: peft.LoraConfig(target_modules=["fc"], use_dora=True), "DoRA"),
        (lambda: peft.LoraConfig(target_modules=["fc"], lora_bias=True), "bias in lora_B"),
        (lambda: peft.LoraConfig(target_modules=["fc"], init_lora_weights="pissa"), "pissa"),
        (lambda: peft.IA3Config(target_modules=["fc"], feedforward_modules=[]), "IA3"),
        (lambda: peft.LoKrConfig(target_modules=["fc"]), "LOKR"),
        (
            lambda: peft.LoraConfig(target_modules=["fc"], trainable_token_indices={"words": [1]}),
            "trainable_token_indices",
        ),
        (lambda: peft.LoraConfig(target_modules=["fc"], r=24), "rank 24 would hold"),
    ],
)
def test_other_adapters_are_refused_with_a_sentence(config, reason, tmp_path):
    net = base()
    before = copy.deepcopy(net.state_dict())
    peft.get_peft_model(copy.deepcopy(net), config()).save_pretrained(tmp_path)
    with pytest.raises(ConversionError, match=reason) as error:
        convert_peft(net, tmp_path)
    assert "\n" not in str(error.value)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert not any(isinstance(layer, FactorisedLayer) for layer in net.modules())


def test_an_adapter_of_another_model_is_refused(tmp_path):
    config = peft.LoraConfig(target_modules=["fc"], init_lora_weights=False)
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    with pytest.raises(MismatchError, match=r"another model.*'block.fc'"):
        convert_peft(nn.Sequential(nn.Linear(24, 24)), tmp_path)
    other = base()
    other.fc = nn.Linear(40, 24)
    with pytest.raises(MismatchError, match=r"'fc'.*y1"):
        convert_peft(other, tmp_path)


def test_files_that_are_missing_damaged_or_pickled(tmp_path):
    with pytest.raises(PayloadError, match=r"adapter_model\.safetensors"):
        convert_peft(base(), tmp_path)
    config = peft.LoraConfig(target_modules=["fc"])
    peft.get_peft_model(base(), config).save_pretrained(tmp_path / "a", safe_serialization=True)
    whole = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(PayloadError, match="damaged"):
        convert_peft(base(), tmp_path / "a")
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(whole)
    (tmp_path / "a" / "adapter_config.json").write_text("[1, 2")
    with pytest.raises(PayloadError, match="not the config"):
        convert_peft(base(), tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(PayloadError, match="a pickle"):
        convert_peft(base(), tmp_path / "b")


def test_options_beside_the_adapter(tmp_path):
    config = peft.LoraConfig(target_modules=["fc"], init_lora_weights=False)
    peft.get_peft_model(base(), config).save_pretrained(tmp_path)
    model = convert_peft(base(), tmp_path, codec="small", trainable=("*norm*",), seed=3)
    found = fedpara.models.config_of(model)
    assert (found.codec, found.seed, found.method, found.base) == ("small", 3, "lowrank", "frozen")
    assert model.norm.weight.requires_grad
    assert not model.head.weight.requires_grad
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
