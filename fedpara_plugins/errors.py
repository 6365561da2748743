"""The errors that this project raises on purpose.

FedParaError
├── ConfigError        an option has an unknown name or a value out of range
├── ConversionError    a model or layer cannot be converted
│   └── NothingToConvertError  no layer of the model can be factorised
├── PayloadError       received bytes, or tensors to be sent, are refused
│   ├── MismatchError  two valid sides disagree (model, reference, version)
│   └── TooLargeError  more bytes than the receiver's own model allows
└── PluginError        a plugin is missing, misspelt, duplicated or unsuitable
"""

from __future__ import annotations

from fedpara_plugins.text import printable, shortened

__all__ = [
    "LONGEST_TEXT",
    "ConfigError",
    "ConversionError",
    "FedParaError",
    "MismatchError",
    "NothingToConvertError",
    "PayloadError",
    "PluginError",
    "TooLargeError",
]


LONGEST_TEXT = 2000
"""Most characters of an error about received data, which it may quote."""


class FedParaError(Exception):
    """Base class of all errors of fedpara-plugins."""


class ConfigError(FedParaError, ValueError):
    """An option is unknown or its value is out of range; the message lists what is allowed."""


class ConversionError(FedParaError):
    """A model cannot be converted; the message names the layer and the remedy."""


class NothingToConvertError(ConversionError):
    """No layer of a model can be factorised; the message says why, kind by kind.

    Attributes:
        for_tuning: whether frozen weights or an adapter's parts are among the reasons, as in a
            model that is fine-tuned: it is small to send as it is.
    """

    def __init__(self, message: str = "", *, for_tuning: bool = False) -> None:
        super().__init__(message)
        self.for_tuning = for_tuning


class PayloadError(FedParaError, ValueError):
    """Bytes are refused before they can do harm, or tensors before they are encoded.

    The text fits one line of a log whatever it quotes: control characters are escaped, and the
    middle of a text with more than `LONGEST_TEXT` characters is left out.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(shortened(message, LONGEST_TEXT)))


class MismatchError(PayloadError):
    """Two sides disagree about model, reference or version; the message names both values."""


class TooLargeError(PayloadError):
    """Received bytes stand for more than the receiver's own model allows; nothing was decoded."""


class PluginError(FedParaError):
    """A plugin is missing, duplicated, misspelt, or does not fit the installed framework.

    Attributes:
        plugin: name of the entry point to leave out as a remedy; None if none would help.
    """

    def __init__(self, message: str = "", *, plugin: str | None = None) -> None:
        super().__init__(message)
        self.plugin = plugin
