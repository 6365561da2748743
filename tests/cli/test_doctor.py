"""``fedpara doctor`` names what stands in the way, and optimizers that came too early are found."""

import importlib.metadata
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.cli import environment
from fedpara_plugins.cli.doctor import check_model
from fedpara_plugins.cli.environment import check_environment
from fedpara_plugins.plugins import Adapter
from fedpara_plugins.support.findings import satisfies


def levels(findings):
    return {finding.subject: finding.level for finding in findings}


@pytest.fixture(autouse=True)
def _healthy(monkeypatch):
    """The installation under the tests must not decide about exit codes."""
    monkeypatch.setattr(environment, "adapters", dict)
    monkeypatch.setattr(environment, "entry_points", lambda group: [])


# What a user carries over


def test_settings_of_the_dense_model_are_stated_with_what_they_do(command):
    code, out, err = command(
        *("doctor", "user_models:Net", "--gamma", "0.2", "--optimizer", "sgd"),
        *("--lr", "0.1", "--weight-decay", "5e-4", "--mu", "0.1"),
    )
    assert (code, err) == (1, "")
    assert re.search(r"^note +learning rate 0.1: .*[01]\.\d\d times as far as dense", out, re.M)
    assert re.search(r"^note +clip relative: bounds ", out, re.M)
    found = re.search(r"weight decay 0.0005: with SGD .* shrink (\d\.\d\d) times", out)
    assert float(found.group(1)) == pytest.approx(1, abs=0.05)
    found = re.search(
        r"^attention +mu 0.1: .* as mu = ([\d.]+) would.*set mu = ([\d.]+)", out, re.M
    )
    held, wanted = map(float, found.groups())
    assert held * wanted == pytest.approx(0.1**2, rel=0.1)
    assert wanted == pytest.approx(0.1, rel=0.1)  # K = 1


@pytest.mark.parametrize(
    ("options", "clip", "variance"),
    [
        ((), r" relative: .* by 0\.03 of the factor's norm", "'norm' is a"),
        (("--method", "pfedpara"), " relative: .* by 0.1 of", "'norm' is a"),
        (("--clip", "relative:0.005"), r" relative:0\.005: .* by 0\.005 of", "'norm' is a"),
        (("--variance", "torch", "--clip", "0.5"), " 0.5: bounds the gradient's norm", None),
        (("--variance", "he", "--clip", "none"), ": off; .*set clip = relative", None),
    ],
)
def test_what_options_with_words_do(command, options, clip, variance):
    _, out, _ = command("doctor", "user_models:Net", "--gamma", "0.2", "--lr", "0.1", *options)
    assert re.search(f"^note +clip{clip}", out, re.M)
    assert bool(re.search("^ok +variance: auto: ", out, re.M)) == bool(variance)
    assert (variance or "") in out


def test_settings_where_clients_train_dense_weights(command):
    code, out, err = command(
        *("doctor", "user_models:Net", "--gamma", "0.2", "--optimizer", "sgd", "--local", "dense"),
        *("--lr", "0.1", "--weight-decay", "5e-4", "--mu", "0.1"),
    )
    assert (code, err) == (0, "")
    assert re.search(r'^note +local = "dense": .*are those of the dense model', out, re.M)
    assert "set clip" not in out
    assert "set mu" not in out


def test_decay_on_each_factor_is_measured_and_needs_attention(command):
    code, out, _ = command(
        *("doctor", "user_models:Net", "--gamma", "0.2", "--decay", "factors"),
        *("--optimizer", "AdamW", "--weight-decay", "0.01"),
    )
    assert code == 1
    found = re.search(r"^attention +weight decay 0.01: .* shrink (\d\.\d\d) times", out, re.M)
    assert 3.5 < float(found.group(1)) < 6.5  # four factors of a matrix, six of a kernel


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--optimizer", "sgdd"], "--optimizer"),
        (["--optimizer", "lr_scheduler"], "--optimizer"),
        (["--optimizer", "Optimizer"], "--optimizer"),
        (["--lr", "-1", "--optimizer", "SGD"], "--lr"),
    ],
)
def test_settings_that_cannot_be_are_refused(refused, words, says):
    assert says in refused("doctor", "user_models:Net", *words)


# Models


def test_every_layer_of_a_healthy_model_is_named(command):
    code, out, err = command("doctor", "user_models:Net", "--gamma", "0.2")
    assert (code, err) == (0, "")
    assert re.search(r"^ok +torch: \d", out, re.MULTILINE)
    assert re.search(r"^ok +head.weight: fedpara of rank \d+: [\d,]+ of 20,480 entries", out, re.M)
    assert re.search(r"^note +stem.weight: stays dense: .*side", out, re.M)
    assert re.search(r"^note +norm: stays dense: BatchNorm2d", out, re.M)
    assert out.endswith("nothing needs attention\n")


@pytest.mark.parametrize(
    ("factory", "subject", "words"),
    [
        ("sick", "head", ["NaN", "load sound weights"]),
        ("shared", "0", ["same module", "2", "copy.deepcopy", "exclude"]),
        ("lazy", "0", ["lazy", "forward pass"]),
        ("parametrised", "0", ["parametrised", "remove_parametrizations"]),
        ("tiny", "(model)", ["no layer of the model can be factorised"]),
    ],
)
def test_what_needs_attention_has_a_reason_and_a_remedy(command, factory, subject, words):
    code, out, err = command("doctor", f"user_models:{factory}")
    assert (code, err) == (1, "")
    line = next(line for line in out.splitlines() if line.startswith("attention"))
    assert line.split(": ")[0].split(maxsplit=1)[1] == subject
    for word in words:
        assert word in line
    assert re.search(r"^1 of \d+ findings need attention$", out, re.MULTILINE)


def test_every_bad_layer_is_listed_not_only_the_first():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(64, 64), nn.LazyLinear(8))
    with torch.no_grad():
        model[1].weight.fill_(torch.inf)
    found = check_model(model, fedpara.FedParaConfig(method="fedpara"))
    assert levels(found) == {"0": "attention", "1": "attention", "2": "attention"}


def test_tied_weights_stay_dense_and_it_is_said(command):
    code, out, _ = command("doctor", "user_models:tied")
    assert code == 0
    assert re.search(r"^note +0.weight: stays dense: tied to 2", out, re.M)
    assert re.search(r"^ok +1.weight: fedpara", out, re.M)


def test_kinds_that_nobody_registered_say_how_to(command):
    code, out, _ = command("doctor", "user_models:own_kinds")
    assert code == 0
    assert re.search(r"^note +0: .*subclass of Linear.*register a kind", out, re.M)
    assert re.search(r"^note +1: .*plugin can register a kind for its 4,096", out, re.M)


def test_trained_weights_are_mentioned(command):
    code, out, err = command("doctor", "user_models:trained")
    assert (code, err) == (0, "")
    assert "looks trained" in out
    assert "looks trained" not in command("doctor", "user_models:trained", "--init", "fit")[1]


def two_layers():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 2))


def test_a_fit_is_stated_with_its_median_and_worst_error_and_what_it_costs():
    config = fedpara.FedParaConfig(method="fedpara", init="fit", rank=4)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(64, 2) @ torch.randn(2, 64))
    dense = [layer.weight.detach().clone() for layer in model]
    texts = [str(finding) for finding in check_model(model, config)]
    errors = [
        float((layer.weight - weight).norm() / weight.norm())
        for layer, weight in zip(model, dense, strict=True)
    ]
    first, middle, worst = sorted(errors)
    assert first < 0.01 < 0.5 < middle
    stated = f"3 fitted weights: median relative error {middle:.3f}, worst {worst:.3f} "
    assert any(text.startswith("ok") and stated in text for text in texts)
    assert any("2 to 25 points of accuracy" in text and "exclude" in text for text in texts)


def test_a_start_of_its_own_is_named():
    model = two_layers()
    nn.init.normal_(model[0].weight, std=0.004)
    found = check_model(model, fedpara.FedParaConfig(method="fedpara"))
    assert "standard deviation of 0.00" in next(str(f) for f in found if f.subject == "0.weight")
    assert "standard deviation" not in next(str(f) for f in found if f.subject == "2.weight")


def test_quantised_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = torch.ao.nn.quantized.dynamic.Linear(64, 64)
    found = check_model(
        nn.Sequential(nn.Linear(64, 64), quantised), fedpara.FedParaConfig(method="fedpara")
    )
    assert levels(found)["1"] == "attention"
    assert "quantised" in next(str(f) for f in found if f.subject == "1")


def test_a_converted_model_is_fine():
    model = fedpara.convert(nn.Sequential(nn.Linear(64, 64)), gamma=0.3)
    found = check_model(model, fedpara.FedParaConfig(method="fedpara"))
    assert {finding.level for finding in found} == {"ok"}


def test_wrong_arguments(refused):
    assert "got 7.0" in refused("doctor", "user_models:Net", "--gamma", "7")
    assert "model, optimizer" in refused("doctor", "--optimizer-check")
    assert "model, optimizer" in refused("doctor", "user_models:Net", "--optimizer-check")


def test_optimizer_check_on_the_command_line(command):
    with pytest.warns(UserWarning, match="built before the model was converted"):
        code, out, _ = command("doctor", "user_models:built_too_early", "--optimizer-check")
    assert code == 1
    assert re.search(r"^attention +optimizer: .* 0.weight, 1.weight", out, re.M)
    code, out, _ = command("doctor", "user_models:built_in_time", "--optimizer-check")
    assert code == 0
    assert re.search(r"^ok +optimizer: SGD", out, re.M)
    code, out, _ = command("doctor", "user_models:never_converted", "--optimizer-check")
    assert code == 1
    assert "not converted" in out


# The environment


def set_versions(monkeypatch, **versions):
    def version(name):
        if versions.get(name.replace("-", "_")) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name.replace("-", "_")]

    monkeypatch.setattr(environment, "version", version)


def test_requirements_are_those_of_the_distribution(monkeypatch):
    set_versions(monkeypatch, torch="2.3.1+cpu", numpy="1.26.4", safetensors=None)
    needed = ["numpy>=1.26", "torch>=2.4", "safetensors (>=0.5)", "flwr>=9; extra == 'flower'"]
    monkeypatch.setattr(environment, "requires", lambda name: needed)
    monkeypatch.setattr(environment, "metadata", lambda name: {"Requires-Python": ">=3.10"})
    found = check_environment()
    assert levels(found)["torch"] == "attention"
    assert levels(found)["numpy"] == "ok"
    assert levels(found)["safetensors"] == "attention"
    assert levels(found)["python"] == "ok"
    assert "flwr" not in levels(found)
    lines = {finding.subject: finding.text for finding in found}
    assert lines["torch"] == "2.3.1+cpu does not fit >=2.4: pip install 'torch>=2.4'"
    assert lines["safetensors"] == "not installed: pip install 'safetensors>=0.5'"


def test_a_folder_that_is_not_installed_is_no_error(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(environment, "requires", missing)
    found = check_environment()
    assert levels(found)["fedpara-plugins"] == "note"
    assert levels(found)["torch"] == "ok"


@pytest.mark.parametrize(
    ("version", "level", "words"),
    [
        ("1.41.0", "ok", "1.41.0 (needs >=1.22)"),
        ("1.9.0", "attention", "pip install 'flwr>=1.22'"),
        (None, "attention", "not installed: pip install 'flwr>=1.22'"),
    ],
)
def test_adapters_and_their_frameworks(monkeypatch, version, level, words):
    adapter = Adapter(name="flower", module="x", requires="flwr>=1.22", lacks=("a steering wheel",))
    monkeypatch.setattr(environment, "adapters", lambda: {"flower": adapter})
    set_versions(monkeypatch, flwr=version, torch="2.5", numpy="2.0", safetensors="1", pluggy="1.5")
    found = check_environment()
    assert levels(found)["adapter flower: flwr"] == level
    assert words in next(f.text for f in found if f.subject == "adapter flower: flwr")
    assert "note       adapter flower: lacks a steering wheel" in map(str, found)


def test_plugins_by_name_version_and_state(monkeypatch):
    def point(name, distribution, version):
        home = SimpleNamespace(metadata={"Name": distribution}, version=version)
        return SimpleNamespace(name=name, value="module", dist=home)

    points = [
        point("flower", "fedpara-plugins-flower", "99.0"),
        point("gates", "my-gates", "3.1"),
        point("odd", "odd", "1.0"),
    ]
    monkeypatch.setattr(environment, "entry_points", lambda group: points)
    monkeypatch.setenv("FEDPARA_PLUGINS_DISABLE", "odd")
    found = {finding.subject: finding for finding in check_environment()}
    assert found["plugin flower"].level == "attention"
    assert "99.0 beside fedpara-plugins" in found["plugin flower"].text
    assert (found["plugin gates"].level, found["plugin gates"].text) == ("ok", "my-gates 3.1")
    assert found["plugin odd"].level == "note"


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.4", True),
        ("2.4", ">=2.4.0", True),
        ("0.2.0", ">=0.1.0,<0.2", False),
        ("0.1.9", ">=0.1.0, <0.2", True),
        ("0.9.6", "==0.9.6", True),
        ("0.9.60", "==0.9.6", False),
        ("1.5", "!=1.5,>1", False),
        ("1.10", "<=1.9", False),
        ("3", "", True),
    ],
)
def test_version_ranges(version, wanted, fits):
    assert satisfies(version, wanted) is fits
