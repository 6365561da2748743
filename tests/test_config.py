import pytest

from fedpara_plugins import ConfigError, FedParaConfig


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


def test_overrides_in_both_forms():
    text = FedParaConfig(gamma=0.1, ratio=0.2, overrides="body.*: gamma=0.5; head: method=none")
    mapping = {"body.*": {"gamma": 0.5}, "head": {"method": "none"}}
    assert FedParaConfig(gamma=0.1, ratio=0.2, overrides=mapping).for_layer("x") is not None
    body = text.for_layer("body.0")
    assert (body.gamma, body.ratio) == (0.5, None)
    assert text.for_layer("head").method == "none"
    assert text.for_layer("stem") is text
    assert hash(text) == hash(FedParaConfig.from_mapping(text.to_mapping()))
