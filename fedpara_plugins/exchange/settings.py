"""The options of a run besides the core's own, with the same names in every adapter."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedpara_plugins.codecs import PRESETS, Codec, parse_codec
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.plugins import method_named

__all__ = ["ExchangeSettings", "codecs_in_words", "to_number"]

PATH_OPTIONS = ("ledger", "checkpoint", "client_checkpoints", "state_dir")
REFERENCES = ("client", "grid")
OUTLIERS = ("warn", "leave_out", "ignore")
SENT = ("trainable", "all")


@dataclass(frozen=True)
class ExchangeSettings:
    """All options that are not those of one framework's adapter.

    Attributes:
        config: the options of the core: method, gamma, codec, ...
        uplink: the chain for messages to the server.
        downlink: the chain for messages to clients; without feedback, since each message is coded
            against what that client really has.
        ledger: file for the bytes of every message, JSON lines; None for none.
        checkpoint: file for the server's dense model at the end (safetensors); None for none.
        client_checkpoints: folder for each client's own dense model; None for none.
        state_dir: folder where server and clients keep what a killed process would lose; None
            leaves it to the process and to the framework.
        references: what a downlink is coded against: ``client``, what that very client holds, or
            ``grid``, a version that all clients share (`fedpara_plugins.references`).
        reference_memory: MiB of references that the server keeps in memory; the rest is on disk.
        outliers: what happens to an update that is far outside of what the other clients of its
            round sent (`exchange.outliers`): ``warn`` names it in the log, ``leave_out`` leaves it
            out too, ``ignore`` does neither.
        send: ``trainable`` leaves out of all messages what does not require gradients in the
            server's model at the start (`exchange.frozen`), ``all`` leaves out nothing.
    """

    config: FedParaConfig
    uplink: Codec
    downlink: Codec
    ledger: Path | None = None
    checkpoint: Path | None = None
    client_checkpoints: Path | None = None
    state_dir: Path | None = None
    references: str = "client"
    reference_memory: float = 256
    outliers: str = "warn"
    send: str = "trainable"

    def __post_init__(self) -> None:
        if self.send not in SENT:
            raise ConfigError(
                f"option 'send': expected one of {', '.join(SENT)}, got {self.send!r}"
            )
        if self.outliers not in OUTLIERS:
            raise ConfigError(
                f"option 'outliers': expected one of {', '.join(OUTLIERS)}, got {self.outliers!r}"
            )
        if self.references not in REFERENCES:
            raise ConfigError(
                f"option 'references': expected one of {', '.join(REFERENCES)}, got "
                f"{self.references!r}"
            )
        if not 0 <= self.reference_memory < 2**40:
            raise ConfigError(
                f"option 'reference_memory': expected a number of MiB, got {self.reference_memory}"
            )

    @staticmethod
    def read(section: MutableMapping[str, Any]) -> dict[str, Any]:
        """Return the fields of this class from a section of options, which is emptied.

        Args:
            section: options by name, with ``_``; an empty text is the default. A ``~`` at the
                beginning of a path is this user's home.

        Raises:
            ConfigError: unknown option, method or codec, or a value out of range.
        """
        paths = {name: str(section.pop(name, None) or "") for name in PATH_OPTIONS}
        references = str(section.pop("references", "")) or "client"
        memory = to_number("reference_memory", section.pop("reference_memory", ""))
        outliers = str(section.pop("outliers", "")).replace("-", "_") or "warn"
        send = str(section.pop("send", "")) or "trainable"
        config = FedParaConfig.from_mapping(section)
        section.clear()
        method_named(config.method)
        return {
            "config": config,
            "uplink": parse_codec(config.uplink_codec or config.codec),
            "downlink": _downlink(parse_codec(config.downlink_codec or config.codec)),
            "references": references,
            "reference_memory": 256 if memory is None else memory,
            "outliers": outliers,
            "send": send,
            **{name: _to_path(name, path) for name, path in paths.items()},
        }

    @property
    def codec_names(self) -> tuple[str, str]:
        """The chains of both directions as text, for the other side to compare: up, down."""
        return self.uplink.name, self.downlink.name

    @property
    def uncoded(self) -> bool:
        """Whether messages hold plain numbers in both directions."""
        return self.uplink.name == self.downlink.name == "none"

    @property
    def trains_dense(self) -> bool:
        """Whether clients train an ordinary model, whose update the plugin projects."""
        return self.config.method != "none" and self.config.local == "dense"

    @property
    def leaves_frozen(self) -> bool:
        """Whether frozen tensors are left out of messages."""
        return self.send == "trainable" and (self.config.method != "none" or not self.uncoded)

    @property
    def active(self) -> bool:
        """Whether the plugin changes messages at all."""
        return self.config.method != "none" or not self.uncoded or bool(self.config.private)


def codecs_in_words(chains: Sequence[str]) -> str:
    """Return the codecs of both directions as a user writes them: presets by their names.

    Args:
        chains: `ExchangeSettings.codec_names`, of this side or of another.
    """
    chains = [*chains, *chains][:2]
    presets = {preset: parse_codec(preset) for preset in PRESETS}
    up = {codec.name: preset for preset, codec in presets.items()}
    down = {_downlink(codec).name: preset for preset, codec in presets.items()}
    words = [known.get(chain, chain) for known, chain in zip((up, down), chains, strict=True)]
    return words[0] if words[0] == words[1] else f"up {words[0]}, down {words[1]}"


def _downlink(codec: Codec) -> Codec:
    return replace(codec, feedback=False)


def _to_path(name: str, value: str) -> Path | None:
    """Return an option's value as a path, ``~`` and ``~user`` expanded; None for an empty text."""
    try:
        return Path(value).expanduser() if value else None
    except RuntimeError as error:
        raise ConfigError(
            f"option {name!r}: the ~ of {value[:80]!r} leads nowhere ({error}); give an "
            f"absolute path"
        ) from None


def to_number(name: str, value: Any) -> float | None:
    """Return an option's value as a number; None for an empty text.

    Raises:
        ConfigError: it is not a number.
    """
    try:
        return None if value == "" else float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"option {name!r}: expected a number, got {value!r}") from None
