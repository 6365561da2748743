import pytest
from torch import nn

from fedpara_plugins import ConfigError, FedParaConfig, convert
from fedpara_plugins.training import round_progress


def test_defaults_change_nothing():
    assert FedParaConfig().method == "none"
    assert FedParaConfig().codec == "none"
    assert FedParaConfig().to_mapping() == {}


def test_reads_a_flat_mapping_with_prefix():
    options = {
        "lr": 0.1,
        "fedpara.method": "fedpara",
        "fedpara.gamma": "0.25",
        "fedpara.min-size": 10,
        "fedpara.exclude": "head, conv1*",
        "fedpara.ratio": "",
    }
    config = FedParaConfig.from_mapping(options, prefix="fedpara.")
    expected = FedParaConfig(method="fedpara", gamma=0.25, min_size=10, exclude=("head", "conv1*"))
    assert config == expected
    assert FedParaConfig.from_mapping(config.to_mapping()) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 7}, ["gamma", "0 to 1", "7"]),
        ({"gamma": -0.1}, ["gamma", "-0.1"]),
        ({"gamma": "much"}, ["gamma", "float", "much"]),
        ({"gamma": float("nan")}, ["gamma", "nan"]),
        ({"ratio": 0}, ["ratio", "(0, 1]"]),
        ({"rank": 0}, ["rank", "at least 1"]),
        ({"rank": 2.5}, ["rank", "int", "2.5"]),
        ({"rank": True}, ["rank", "int"]),
        ({"ratio": 0.5, "rank": 3}, ["ratio", "rank"]),
        ({"gama": 0.1}, ["gama", "gamma"]),
        ({"speed": 0}, ["speed"]),
        ({"private_speed": 0}, ["private_speed"]),
        ({"clip": 0}, ["'clip'", "relative:SHARE", "got 0"]),
        ({"clip": "inf"}, ["'clip'", "'none'", "'inf'"]),
        ({"clip": "relative:0"}, ["'clip'", "'relative:0'"]),
        ({"clip": "relative:"}, ["'clip'", "'relative:'"]),
        ({"clip": "absolute"}, ["'clip'", "'relative'", "'absolute'"]),
        ({"clip": True}, ["'clip'", "True"]),
        ({"variance": "xavier"}, ["'variance'", "'torch', 'he', 'auto'", "'xavier'"]),
        ({"variance": 0}, ["'variance'", "1e-09"]),
        ({"min_size": -1}, ["min_size"]),
        ({"tanh": "perhaps"}, ["tanh", "bool", "perhaps"]),
        ({"overrides": {"head": {"gamma": 7}}}, ["gamma", "7"]),
        ({"overrides": {"head": {"codec": "int8"}}}, ["overrides", "'head'", "codec", "rank"]),
        ({"overrides": "head"}, ["overrides", "head", "gamma=0.5"]),
    ],
)
def test_bad_options_say_what_is_expected_and_what_came(options, words):
    with pytest.raises(ConfigError) as caught:
        FedParaConfig.from_mapping(options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        *(("relative", "relative"), (" Relative ", "relative"), ("relative: .02", "relative:0.02")),
        *(("relative:2e-2", "relative:0.02"), ("1.5", 1.5), (2, 2.0), ("none", None)),
    ],
)
def test_values_of_clip(given, kept):
    config = FedParaConfig.from_mapping({"fp.clip": given}, prefix="fp.")
    assert config.clip == kept
    assert FedParaConfig.from_mapping(config.to_mapping()) == config
    assert FedParaConfig(clip=kept) == config


def test_no_clip_is_none_in_python_and_in_mappings_a_word():
    assert FedParaConfig(clip=None).clip is None
    assert FedParaConfig.from_mapping({"clip": None}) == FedParaConfig()
    for options in ({"clip": None}, {"clip": "none"}):
        model = nn.Linear(64, 64)
        assert round_progress(convert(model, gamma=0.1, **options)).config.clip is None
        config = FedParaConfig(method="fedpara", clip=1.0)
        assert round_progress(convert(model, config, **options)).config.clip is None


def test_the_former_name_of_torch_s_variance():
    assert FedParaConfig(variance="default") == FedParaConfig(variance="torch")


def test_overrides_in_both_forms():
    text = FedParaConfig(gamma=0.1, ratio=0.2, overrides="body.*: gamma=0.5; head: method=none")
    mapping = {"body.*": {"gamma": 0.5}, "head": {"method": "none"}}
    assert FedParaConfig(gamma=0.1, ratio=0.2, overrides=mapping).for_layer("x") is not None
    body = text.for_layer("body.0")
    assert (body.gamma, body.ratio) == (0.5, None)
    assert text.for_layer("head").method == "none"
    assert text.for_layer("stem") is text
    assert hash(text) == hash(FedParaConfig.from_mapping(text.to_mapping()))
