"""``fedpara export --peft``: an adapter comes out, or a line that says why.

`tests/models/test_peft_interchange.py` loads such adapters with the real library.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.models import save_factors

USER = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40))

def other():
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40))

def larger():
    return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), nn.Linear(64, 40))
"""


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 40))


@pytest.fixture(autouse=True)
def _user_code(command):
    Path("user_nets.py").write_text(USER)


def trained(method="lowrank", **options):
    model = fedpara.convert(net(), method=method, rank=3, base="frozen", **options)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def composed(folder):
    """Return the adapter's weights over those of the net, by the formulas that PEFT documents."""
    config = json.loads(Path(folder, "adapter_config.json").read_text())
    tensors = load_file(Path(folder, "adapter_model.safetensors"))
    weights = {}
    for name in ("0", "2"):
        place = f"base_model.model.{name}"
        if config["peft_type"] == "LORA":
            product = tensors[f"{place}.lora_B.weight"] @ tensors[f"{place}.lora_A.weight"]
            rank, alpha = config["r"], config["lora_alpha"]
        else:
            halves = [
                tensors[f"{place}.hada_w{i}_a"] @ tensors[f"{place}.hada_w{i}_b"] for i in (1, 2)
            ]
            product, rank, alpha = halves[0] * halves[1], config["r"], config["alpha"]
        rank = config["rank_pattern"].get(f"^{name}", rank)
        alpha = config["alpha_pattern"].get(f"^{name}", alpha)
        weights[name] = net()[int(name)].weight + alpha / rank * product
    return weights


@pytest.mark.parametrize("method", ["lowrank", "fedpara"])
@pytest.mark.parametrize("options", [{}, {"overrides": {"2": {"rank": 5, "speed": 0.8}}}])
def test_the_adapter_has_the_weights_of_the_model(command, method, options):
    model = trained(method, **options)
    save_factors(model, "factors.safetensors")
    words = ["export", "factors.safetensors", "--peft", "new/adapter", "--model", "user_nets:net"]
    code, out, err = command(*words, "--base-model", "org/name")
    assert (code, err) == (0, "")
    assert f"{'LORA' if method == 'lowrank' else 'LOHA'} adapter" in out
    assert "differ" not in out
    for name, weight in composed("new/adapter").items():
        torch.testing.assert_close(model[int(name)].weight, weight, rtol=1e-4, atol=1e-6)
    config = json.loads(Path("new/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name"
    assert config["modules_to_save"] is None


def test_a_state_dict_of_the_user_s_own_needs_the_options(command):
    model = trained()
    torch.save(model.state_dict(), "state.pt")
    words = ["export", "state.pt", "--peft", "adapter", "--model", "user_nets:net"]
    code, _, err = command(*words)
    assert code == 2
    assert "give method and rank" in err
    code, _, err = command(*words, "--method", "lowrank", "--rank", "3", "--base", "frozen")
    assert (code, err) == (0, "")
    for name, weight in composed("adapter").items():
        torch.testing.assert_close(model[int(name)].weight, weight, rtol=1e-4, atol=1e-6)


def test_other_frozen_weights_than_the_factory_s_are_said(command):
    save_factors(trained(), "factors.safetensors")
    words = ["export", "factors.safetensors", "--peft", "adapter", "--model"]
    code, out, _ = command(*words, "user_nets:other")
    assert code == 0
    assert "differ from those of user_nets:other ('0.weight', 2 in all)" in out


def test_what_is_refused_is_one_line(command):
    save_factors(trained(), "factors.safetensors")
    fresh = fedpara.convert(net(), method="fedpara", rank=3)
    save_factors(fresh, "fresh.safetensors")
    model = ["--model", "user_nets:net"]
    for words, code, text in [
        (["factors.safetensors", "--peft", "a"], 2, "--peft needs --model"),
        (["factors.safetensors"], 2, "one of the arguments"),
        (["factors.safetensors", "--peft", "a", "-o", "b", *model], 2, "not allowed with"),
        (["fresh.safetensors", "--peft", "a", *model], 1, "base='frozen'"),
        (["factors.safetensors", "--peft", "a", "--model", "user_nets:larger"], 1, "differ"),
    ]:
        found, _, err = command("export", *words)
        assert found == code
        assert text in err
        assert err.count("\n") == 1
        assert not Path("a").exists()


def test_a_client_s_private_update_is_for_its_owner_alone(command):
    model = trained("pfedpara")
    save_factors(model, "own.safetensors")
    save_factors(model, "shared.safetensors", private=False)
    for name, private in (("own", True), ("shared", False)):
        words = ["export", f"{name}.safetensors", "--peft", name, "--model", "user_nets:net"]
        assert command(*words)[0] == 0
        mode = Path(name, "adapter_model.safetensors").stat().st_mode & 0o077
        assert (mode == 0) is private
        layer = model[0]
        factors = layer.factors("weight")
        if not private:
            factors = {
                k: f * (k not in layer.plans["weight"].private_names) for k, f in factors.items()
            }
        wanted = layer.plans["weight"].compose(factors, net()[0].weight)
        torch.testing.assert_close(composed(name)["0"], wanted, rtol=1e-4, atol=1e-6)
