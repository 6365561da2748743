"""Every error that this project raises on purpose.

FedParaError
├── ConfigError        an option has an unknown name or a value out of range
├── ConversionError    a model or layer cannot be converted
├── PayloadError       received bytes, or tensors about to be sent, are refused
│   └── MismatchError  both sides are sound but disagree (model, reference, version)
└── PluginError        a plugin is missing, misspelt, duplicated or unsuited
"""

from __future__ import annotations

from fedpara_plugins.text import printable, shortened

__all__ = [
    "LONGEST_TEXT",
    "ConfigError",
    "ConversionError",
    "FedParaError",
    "MismatchError",
    "PayloadError",
    "PluginError",
]


LONGEST_TEXT = 2000
"""Characters of an error's text, where it quotes what a stranger sent."""


class FedParaError(Exception):
    """Base of all errors of fedpara-plugins."""


class ConfigError(FedParaError, ValueError):
    """An option is unknown or its value is out of range; the message lists what is allowed."""


class ConversionError(FedParaError):
    """A model cannot be converted; the message names the layer and the remedy."""


class PayloadError(FedParaError, ValueError):
    """Bytes are refused before they can do harm, or tensors before they are encoded.

    The text fits a line of a log whatever it quotes: no control characters, and no more than
    `LONGEST_TEXT` characters, the middle of a longer one left out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(shortened(message, LONGEST_TEXT)))


class MismatchError(PayloadError):
    """Two sides disagree about model, reference or version; the message names both values."""


class PluginError(FedParaError):
    """A plugin is missing, duplicated, misspelt, or does not fit the installed framework.

    Attributes:
        plugin: name of the entry point without which things would work; None if there is no such.
    """

    def __init__(self, message: str = "", *, plugin: str | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin
