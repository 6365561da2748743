"""A check of the options that name codecs."""

from __future__ import annotations

from fedpara_plugins.codecs.text import parse_codec
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError

__all__ = ["check_codecs"]


def check_codecs(config: FedParaConfig) -> None:
    """Raise unless the options ``codec``, ``uplink_codec`` and ``downlink_codec`` name codecs.

    Raises:
        ConfigError: names the option, the text and the nearest known codec.
    """
    for option in ("codec", "uplink_codec", "downlink_codec"):
        text = getattr(config, option)
        if text is None:
            continue
        try:
            parse_codec(text)
        except ConfigError as error:
            raise ConfigError(f"option {option!r}: {error}") from error
