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
    ],
)
def test_bad_options_say_what_is_expected_and_what_came(options, words):
    with pytest.raises(ConfigError) as caught:
        FedParaConfig.from_mapping(options)
    for word in words:
        assert word in str(caught.value)
