"""The head of a message: what server and client tell each other beside tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from fedpara_plugins import ConfigError, FedParaError, PayloadError
from fedpara_plugins.support import printable, shortened

__all__ = ["MODEL", "Head", "Purpose"]

Purpose = Literal["train", "evaluate", "prepare"]
"""``prepare`` asks for what goes before training, see `Rule.prepares`."""

MODEL = "model"
"""Name of the record that holds the model."""

LONGEST = 1000
"""Characters of an error that travels."""


@dataclass(frozen=True)
class Head:
    """What a message says.

    Attributes:
        round: that it belongs to, 1 for the first.
        purpose: what is asked of the client, or what it answers.
        task: server to client: the rule's values.
        examples: the client's number of training examples.
        holds: by record, the hash of what the client has received and kept.
        has: where ``lost``: by record, the hashes of what it holds.
        decoders: the entropy stages that the client can decode.
        fresh: the client had no private state and started from the seeded first one.
        lost: the client does not hold what the message was coded against; nothing was done.
        report: client to server: the rule's values.
        metrics: client to server: of an evaluation.
        error: why the client has no answer; "" if it has.
        fatal: whether the error is one of configuration, which no other round will mend.
    """

    round: int
    purpose: Purpose = "train"
    task: Mapping[str, Any] = field(default_factory=dict)
    examples: float = 0.0
    holds: Mapping[str, str] = field(default_factory=dict)
    has: Mapping[str, Sequence[str]] = field(default_factory=dict)
    decoders: Sequence[str] = ()
    fresh: bool = False
    lost: bool = False
    report: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    fatal: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is as by default is left out."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name == "round" or value != _DEFAULTS[name]
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Head:
        """Undo `to_json`, of what anyone may have sent; names that are unknown here are ignored.

        Raises:
            PayloadError: a value of another kind.
        """
        values = {name: data[name] for name in _KINDS if name in data}
        for name, value in values.items():
            if isinstance(value, bool) != (_KINDS[name] is bool) or not isinstance(
                value, _KINDS[name]
            ):
                raise PayloadError(f"the head of a message has {repr(value)[:80]} for {name!r}")
        if type(values.get("round")) is not int:
            raise PayloadError("the head of a message names no round")
        if values.get("purpose", "train") not in get_args(Purpose):
            raise PayloadError(
                f"the head of a message has the purpose {values['purpose']!r}, known are "
                f"{', '.join(get_args(Purpose))}"
            )
        _check_texts("holds", values.get("holds", {}).values())
        _check_texts("decoders", values.get("decoders", ()))
        for held in values.get("has", {}).values():
            _check_texts("has", held if isinstance(held, list) else [held, None])
        return cls(**values)

    def failed(self, error: BaseException, *, fatal: bool) -> Head:
        """The same head, saying why there is no answer."""
        text = printable(shortened(str(error).removeprefix("fedpara: "), LONGEST))
        if not isinstance(error, FedParaError):
            text = f"{type(error).__name__}: {text}"
        return Head(round=self.round, purpose=self.purpose, error=text, fatal=fatal)

    def raise_error(self, client: str) -> None:
        """Raise what the other side could not do.

        Raises:
            ConfigError: an error of configuration.
            FedParaError: another one.
        """
        text = printable(shortened(self.error, LONGEST))
        if self.fatal:
            raise ConfigError(f"fedpara: client {client}: {text}")
        if self.error:
            raise FedParaError(f"it could not train: {text}")


_DEFAULTS: dict[str, Any] = {
    f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(Head)
}
_KINDS: dict[str, Any] = {
    "round": int,
    "purpose": str,
    "task": dict,
    "examples": (int, float),
    "holds": dict,
    "has": dict,
    "decoders": list,
    "fresh": bool,
    "lost": bool,
    "report": dict,
    "metrics": dict,
    "error": str,
    "fatal": bool,
}


def _check_texts(name: str, values: Any) -> None:
    if not all(isinstance(value, str) for value in values):
        raise PayloadError(f"the head of a message has other than text in {name!r}")
