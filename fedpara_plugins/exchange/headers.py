"""The fields that each side writes into a payload's header for the other, and their checks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from fedpara_plugins.codecs import COMPACT, Description, HeaderForm, PayloadHeader, readable
from fedpara_plugins.errors import ConfigError, PayloadError, TooLargeError
from fedpara_plugins.exchange.settings import codecs_in_words
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.spec_rows import plan_from_row
from fedpara_plugins.references import DecodedDownlink

__all__ = [
    "check_codecs",
    "check_rows",
    "decoders_of",
    "downlink_form",
    "first_model_limit",
    "header_extra",
    "plans_of",
    "reply_form",
    "spec_of",
]

DECODERS = "decoders"
CODECS = "codecs"

FIRST_EXPANSION, FIRST_LEAST = 64, 2**28
"""A first model may take this many times its payload, and this many bytes in any case: weights are
hardly compressible, but parts of them may all be equal."""


def header_extra(codecs: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return this side's fields of a payload's header: what it decodes, and its codecs if given.

    Args:
        codecs: its settings, for a receiver that is to compare them with its own; () leaves them
            out.
    """
    words = {DECODERS: list(readable())}
    return {**words, CODECS: list(codecs)} if codecs else words


def decoders_of(header: PayloadHeader) -> tuple[str, ...]:
    """Return what the sender of a payload can decode: entropy stages, versions of headers."""
    return _texts(header, DECODERS)


def downlink_form(
    decoders: Collection[str] | None, description: Description, held: str | None
) -> HeaderForm | None:
    """Return how the header of a message to a client is written.

    Args:
        decoders: what the client says that it can decode; None if it has not said anything. Then
            version 1 is written, which every release reads.
        description: of the record.
        held: hash of the description that the client holds of the record.
    """
    if COMPACT not in (decoders or ()):
        return None
    return HeaderForm(description if held == description.digest else None)


def reply_form(answered: DecodedDownlink | None) -> HeaderForm | None:
    """Return how the header of a reply is written; the sender of a message holds its description.

    Args:
        answered: the message of which the reply's header may repeat something; None for none.
    """
    if answered is None or COMPACT not in decoders_of(answered.header):
        return None
    return HeaderForm(Description.of(answered.header.model, answered.tensors))


def check_codecs(header: PayloadHeader, mine: tuple[str, str], *, remedy: str) -> None:
    """Raise if the sender of a payload has other codecs than this side.

    Each side would go on sending whole models. A header without codecs passes.

    Args:
        header: of the payload.
        mine: `ExchangeSettings.codec_names` of this side.
        remedy: the sentence that says where a user sets the codec.

    Raises:
        ConfigError: names both codecs.
    """
    theirs = _texts(header, CODECS)
    if theirs and theirs != mine:
        raise ConfigError(
            f"the codec differs: this client has {codecs_in_words(mine)}, the server has "
            f"{codecs_in_words(theirs)}. {remedy}"
        )


def spec_of(header: PayloadHeader, names: Iterable[str], *, limit: int) -> ModelSpec:
    """Return the model that a payload describes.

    Args:
        header: of the payload.
        names: of its tensors.
        limit: bytes that the private tensors may have.

    Raises:
        PayloadError: it describes none, or an unsound one.
    """
    if header.model is None:
        raise PayloadError("fedpara: the message describes no model; was it made by this plugin?")
    return ModelSpec.from_json(header.model, tuple(names), limit=limit)


def check_rows(header: PayloadHeader, most: int) -> None:
    """Raise for a description of more weights or names than a receiver expects.

    Each takes time, and none of them needs a tensor in the payload.

    Args:
        header: of the payload.
        most: weights, and names of each sort.

    Raises:
        TooLargeError: says how many there are.
    """
    for field, rows in (header.model or {}).items():
        if isinstance(rows, list | dict) and len(rows) > most:
            raise TooLargeError(
                f"fedpara: the message describes {len(rows)} {field[:40]!r} of a model, this side "
                f"expects at most {most}; build the same model on both sides"
            )


def plans_of(header: PayloadHeader) -> ModelSpec:
    """Return the factorised weights that a payload describes, in a spec without names.

    Raises:
        PayloadError: it describes none, or an unsound one.
    """
    if header.model is None:
        raise PayloadError("fedpara: the message describes no model; was it made by this plugin?")
    try:
        weights = {str(row[0]): plan_from_row(row) for row in header.model["weights"]}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise PayloadError(f"the header's model description is malformed: {error!r}") from error
    return ModelSpec(weights=weights, keys=(), seed=0)


def first_model_limit(payload: bytes) -> int:
    """Return the bytes that the model in a reply may take, where the server has built none.

    This is for the one reply that a server itself asks one client for, to learn its model
    (`ReplyReader.read_first`). Nothing else gives a bound there. Wherever this side has a model or
    has sent one, `MessageBudget` does: a client always has its own.

    Args:
        payload: of the reply.
    """
    return max(FIRST_EXPANSION * len(payload), FIRST_LEAST)


def _texts(header: PayloadHeader, name: str) -> tuple[str, ...]:
    found = (header.extra or {}).get(name)
    return tuple(map(str, found)) if isinstance(found, list) else ()
