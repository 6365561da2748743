"""A conversion is decided as a whole before anything of the model is changed."""

import warnings

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError, ConversionError, FedParaConfig
from fedpara_plugins.layers import FactorisedLinear
from fedpara_plugins.layers.personal import PersonalLinear
from fedpara_plugins.models.conversion import replace
from fedpara_plugins.models.decisions import Conversion, decide, repeated_modules
from fedpara_plugins.models.layer_decisions import decide_layers

FEDPARA = FedParaConfig(method="fedpara", gamma=0.3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 48), nn.Linear(48, 2))


def everything(model):
    """All that a change of the model would change."""
    modules = {name: (id(m), type(m), list(vars(m))) for name, m in model.named_modules()}
    return modules, {name: id(value) for name, value in model.state_dict(keep_vars=True).items()}


def test_a_decision_says_what_a_conversion_does_and_changes_nothing():
    model = net()
    before = everything(model)
    conversion = decide(model, FEDPARA)
    assert everything(model) == before
    assert [decision.name for decision in conversion.layers] == ["0", "2"]
    assert {name: id(w) for name, w in conversion.weights.items()} == {
        "0.weight": id(model[0].weight),
        "2.weight": id(model[2].weight),
    }
    assert (conversion.config, conversion.head, conversion.warnings) == (FEDPARA, None, ())
    assert replace(model, conversion) is model
    assert [type(layer) for layer in model][:3:2] == [FactorisedLinear] * 2
    assert fedpara.models.config_of(model) is FEDPARA


def test_the_head_is_replaced_whether_it_is_factorised_or_not():
    config = FedParaConfig(method="pfedpara", label_prior=True)
    conversion = decide(net(), config)
    assert conversion.head == "3"
    assert [decision.name for decision in conversion.layers] == ["0", "2", "3"]
    assert conversion.layers[-1].plans == {}
    assert "3.weight" not in conversion.weights
    assert type(replace(net(), decide(net(), config))) is nn.Sequential
    model = net()
    assert type(replace(model, decide(model, config))[3]) is PersonalLinear


def test_without_a_method_nothing_is_replaced_and_private_names_are_checked():
    model = net()
    none = FedParaConfig()
    assert decide(model, none) == Conversion(config=none)
    before = everything(model)
    assert replace(model, decide(model, none)) is model
    assert everything(model) == before
    private = FedParaConfig(private=("3.*",))
    assert decide(model, private).layers == ()
    replace(model, decide(model, private))
    assert fedpara.models.config_of(model) is private
    with pytest.raises(ConfigError, match="matches no name"):
        decide(model, FedParaConfig(private=("4.*",)))


def damaged(model):
    model[0].weight.data[0, 0] = float("nan")
    return model


def frozen(model):
    return model.requires_grad_(False)


def twice(model):
    return nn.Sequential(*model, model[0])


ALL = FedParaConfig(
    method="fedpara", private=("9.*",), exclude=("9",), private_head=True, schedule="decoupled"
)


@pytest.mark.parametrize(
    ("build", "config", "error", "words"),
    [
        (lambda: nn.Linear, FedParaConfig(method="unknown"), ConversionError, "expected a torch"),
        (net, FedParaConfig(method="unknown", private=("9.*",)), ConfigError, "option 'method'"),
        (lambda: fedpara.convert(net()), ALL, ConfigError, "option 'private'"),
        (lambda: fedpara.convert(net()), FEDPARA, ConversionError, "already factorised"),
        (lambda: damaged(net()), FedParaConfig(method="fedpara", exclude=("9",)), ConfigError,
         "option 'exclude'"),
        (lambda: twice(damaged(net())), FEDPARA, ConversionError, "NaN"),
        (lambda: twice(net()), FedParaConfig(method="fedpara", ratio=0.01), ConversionError,
         "one and the same"),
        (net, FedParaConfig(method="fedpara", ratio=0.01), ConversionError, "cannot be reached"),
        (lambda: frozen(net()),
         FedParaConfig(method="fedpara", private_head=True, schedule="decoupled"),
         ConversionError, "no layer of the model"),
        (net, FedParaConfig(method="fedpara", private_head=True, schedule="decoupled"),
         ConfigError, "option 'private_head'"),
    ],
)  # fmt: skip
def test_the_first_error_is_the_one_that_comes_first(build, config, error, words):
    """And the model is as it was, whichever it is."""
    model = build()
    before = everything(model) if isinstance(model, nn.Module) else None
    with pytest.raises(error, match=words):
        fedpara.convert(model, config)
    if before is not None:
        assert everything(model) == before


def test_warnings_are_told_by_the_decision_and_given_by_convert():
    model = net()
    model[2].weight.register_hook(lambda gradient: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = decide(model, FEDPARA).warnings
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        fedpara.convert(model, FEDPARA)
    assert [str(warning.message) for warning in given] == list(told)
    assert "hooks were registered on 2.weight" in told[0]
    assert {warning.filename for warning in given} == {__file__}


def test_every_layer_s_error_can_be_collected():
    model = damaged(net())
    model[2].weight.data[0, 0] = float("inf")
    refused = {}
    decided = decide_layers(model, FEDPARA, refused=refused)
    assert list(refused) == ["0", "2"]
    assert [decision.name for decision in decided] == ["1", "3"]


def test_modules_in_several_places_are_named_by_all_of_them():
    model = twice(net())
    assert repeated_modules(model, decide_layers(model, FEDPARA)) == [["0", "4"]]
    converted = fedpara.convert(net(), FEDPARA)
    again = nn.Sequential(converted[0], converted[0])
    assert repeated_modules(again, decide_layers(again, FEDPARA)) == []
