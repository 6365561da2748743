"""What a user may set for a run, whatever the framework."""

from pathlib import Path

import pytest

from fedpara_plugins import ConfigError
from fedpara_plugins.exchange.settings import ExchangeSettings, codecs_in_words


def settings(**options):
    return ExchangeSettings(**ExchangeSettings.read(dict(options)))


def test_a_users_home_in_a_path_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("ledger", "checkpoint", "client_checkpoints", "state_dir")
    found = settings(**{name: f"~/runs/{name}" for name in names})
    assert [getattr(found, name) for name in names] == [tmp_path / "runs" / n for n in names]
    assert settings(ledger="a/~b").ledger == Path("a/~b")
    assert settings(ledger="").ledger is None
    with pytest.raises(ConfigError, match="option 'state_dir': the ~ of '~nobody-of-that-name/x'"):
        settings(state_dir="~nobody-of-that-name/x")


def test_sections_of_all_adapters_are_read_alike(tmp_path):
    found = settings(codec="small", downlink_codec="none", ledger=str(tmp_path / "l"), state_dir="")
    assert (found.ledger, found.state_dir) == (tmp_path / "l", None)
    assert found.uplink.feedback
    assert not found.downlink.feedback
    assert found.codec_names[1] == "none"
    assert not found.uncoded
    with pytest.raises(ConfigError, match="references"):
        settings(references="server")
    with pytest.raises(ConfigError, match="reference_memory"):
        settings(reference_memory="much")


def test_what_happens_to_outliers():
    assert settings().outliers == "warn"
    assert settings(outliers="leave-out").outliers == settings(outliers="leave_out").outliers
    with pytest.raises(ConfigError, match="'outliers': expected one of warn, leave_out, ignore"):
        settings(outliers="drop")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"codec": "small"}, "small"),  # whose feedback the downlink has not
        ({"codec": "none"}, "none"),
        ({"codec": "delta+int8"}, "delta+int8"),
        ({"uplink_codec": "small"}, "up small, down none"),
        ({"codec": "tiny", "downlink_codec": "balanced"}, "up tiny, down balanced"),
    ],
)
def test_codecs_are_told_as_users_write_them(section, words):
    assert codecs_in_words(settings(**section).codec_names) == words
    assert codecs_in_words(["of a stranger"]) == "of a stranger"
