"""The head of a message: the fields that server and client exchange besides tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from fedpara_plugins import ConfigError, FedParaError, PayloadError
from fedpara_plugins.support import printable, shortened

__all__ = ["MODEL", "Head", "Purpose"]

Purpose = Literal["train", "evaluate", "prepare"]
"""Purpose of a message; ``prepare`` asks for a step before training, see `Rule.prepares`."""

MODEL = "model"
"""Name of the record that holds the model."""

LONGEST = 1000
"""Number of characters of an error that are sent."""


@dataclass(frozen=True)
class Head:
    """The fields of a message from server to client, or back.

    Attributes:
        round: that it belongs to, 1 for the first.
        purpose: of the server's message, or of the one that this replies to.
        task: server to client: the optimizer's values.
        examples: the client's number of training examples.
        holds: by record, the hash of the reference that the client has received and kept.
        has: where ``lost``: by record, the hashes of the references that it holds.
        decoders: the entropy stages that the client can decode.
        fresh: whether the client had no private state and started from the seeded first one.
        lost: whether the client lacks the reference that the message was coded against; it did not
            train then.
        lacks: where ``lost``: the records whose frozen tensors the client has to be sent.
        report: client to server: the optimizer's values.
        metrics: client to server: of an evaluation.
        error: reason why the client has no reply; "" if it has.
        fatal: whether the error is one of configuration, which persists in later rounds.
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
    lacks: Sequence[str] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    fatal: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; those with their defaults are left out."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name == "round" or value != _DEFAULTS[name]
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Head:
        """Return the head of a message; the sender is not trusted, and unknown fields are ignored.

        Raises:
            PayloadError: if a value is of another kind.
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
        _check_texts("lacks", values.get("lacks", ()))
        for held in values.get("has", {}).values():
            _check_texts("has", held if isinstance(held, list) else [held, None])
        return cls(**values)

    def failed(self, error: BaseException, *, fatal: bool) -> Head:
        """Return the head of a reply that gives the reason why there is none.

        Args:
            error: the reason.
            fatal: see above.
        """
        text = printable(shortened(str(error).removeprefix("fedpara: "), LONGEST))
        if not isinstance(error, FedParaError):
            text = f"{type(error).__name__}: {text}"
        return Head(round=self.round, purpose=self.purpose, error=text, fatal=fatal)

    def raise_error(self, client: str) -> None:
        """Raise the error in the head, if there is one.

        Args:
            client: that sent it.

        Raises:
            ConfigError: if it is fatal.
            FedParaError: if it is another error.
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
    "lacks": list,
    "report": dict,
    "metrics": dict,
    "error": str,
    "fatal": bool,
}


def _check_texts(name: str, values: Any) -> None:
    if not all(isinstance(value, str) for value in values):
        raise PayloadError(f"the head of a message has a value other than text in {name!r}")
