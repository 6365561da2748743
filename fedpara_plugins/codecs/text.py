"""Parser of the line of text in which users name a codec.

    text  = preset | item "+" item ...
    item  = name | name ":" key "=" value "," key "=" value ...

A name is that of a stage, or one of the words ``feedback`` and ``entropy``, which are no stages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from fedpara_plugins.codecs.chain import FEEDBACK, NONE, Codec, EntropyChoice
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.plugins import stages as registered_stages
from fedpara_plugins.stages.options import check_option_names, read_choice
from fedpara_plugins.stages.stage import Stage

__all__ = ["PRESETS", "parse_codec"]

ENTROPY = "entropy"

PRESETS: Mapping[str, str] = {
    NONE: "",
    # Most bits of a float are noise: only the exponents can be compressed.
    "lossless": "planes+entropy:prefer=zstd",
    "int8": "delta+int8+zlib",
    # The largest error of a value is 2.5 % of the root mean square, the usual one 1.44 %.
    "balanced": "delta+quantise:rms=0.05+entropy:prefer=zstd",
    "small": "delta+feedback+quantise:rms=2+entropy:prefer=ans",
    "tiny": "delta+feedback+quantise:rms=4+entropy:prefer=ans",
}
"""Names of whole codecs. A preset takes precedence over a single stage of the same name."""

CODERS = ("ans", "zstd", "zlib")
"""Candidates for the word ``entropy``: smallest output first; every installation has the last."""

Item = tuple[str, dict[str, str]]


def parse_codec(text: str, stages: Mapping[str, Stage] | None = None) -> Codec:
    """Return the codec that a text names.

    Args:
        text: a preset, or stages joined by ``+``, such as ``delta+quantise:bits=4+entropy``; spaces
            around names, keys and values are ignored.
        stages: known stages by name; all registered ones if None.

    Raises:
        ConfigError: the text is empty, a stage or option is unknown, a value does not fit, or a
            stage is repeated or out of place; the message lists what is known.
    """
    known = registered_stages() if stages is None else stages
    whole = PRESETS.get(text.strip(), text)
    if not whole and text.strip():
        return Codec(())
    items = [_item(part, whole) for part in whole.split("+")]
    names = [name for name, _ in items]
    for word in (FEEDBACK, ENTROPY):
        if names.count(word) > 1:
            raise ConfigError(f"codec {whole!r}: {word!r} occurs twice")
    if ENTROPY in names[:-1]:
        follows = names[names.index(ENTROPY) + 1]
        raise ConfigError(
            f"codec {whole!r}: 'entropy' must be the last item, but {follows!r} follows"
        )
    chain = [_stage(item, known, whole) for item in items if item[0] not in (FEEDBACK, ENTROPY)]
    entropy = _entropy(items[-1][1], known, whole) if ENTROPY in names else None
    codec = Codec(tuple(chain), feedback=FEEDBACK in names, entropy=entropy)
    if codec.feedback:
        _check_feedback(items, codec, whole)
    return codec


def _item(part: str, whole: str) -> Item:
    name, colon, rest = part.partition(":")
    options: dict[str, str] = {}
    for pair in rest.split(",") if colon else ():
        key, equals, value = (word.strip() for word in pair.partition("="))
        if not (key and equals and value):
            raise ConfigError(
                f"codec {whole!r}: expected key=value after {name.strip()!r} and ':', got "
                f"{pair.strip()!r}; an example is quantise:bits=4,scope=row"
            )
        if key in options:
            raise ConfigError(f"codec {whole!r}: {name.strip()!r} has option {key!r} twice")
        options[key] = value
    return name.strip(), options


def _stage(item: Item, known: Mapping[str, Stage], whole: str) -> Stage:
    name, options = item
    if name in known:
        try:
            return known[name].with_options(options)
        except ConfigError as error:
            raise ConfigError(f"codec {whole!r}: {error}") from error
    words = [FEEDBACK, ENTROPY]
    if name in PRESETS:
        hint = f"; {name!r} is a preset, which stands alone and has no options."
    else:
        near = get_close_matches(name, [*known, *words, *PRESETS], n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ConfigError(
        f"codec: unknown stage {name!r} in {whole!r}{hint} Presets: {', '.join(PRESETS)}. Stages, "
        f"to be joined by '+': {', '.join(known)}, and the words {' and '.join(words)}"
    )


def _check_feedback(items: Sequence[Item], codec: Codec, whole: str) -> None:
    names = [name for name, _ in items]
    if options := dict(items)[FEEDBACK]:
        raise ConfigError(f"codec {whole!r}: 'feedback' has no options, got {', '.join(options)}")
    place = names.index(FEEDBACK)
    first = sum(stage.needs_reference for stage in codec.stages)
    if place < first:
        raise ConfigError(
            f"codec {whole!r}: 'feedback' must come after {codec.stages[first - 1].name!r}: it "
            "keeps what the stages that follow it lose"
        )
    if place > first:
        raise ConfigError(
            f"codec {whole!r}: 'feedback' must come before {names[first]!r}: it keeps what the "
            "stages that follow it lose"
        )


def _entropy(options: Mapping[str, str], known: Mapping[str, Stage], whole: str) -> EntropyChoice:
    try:
        check_option_names(ENTROPY, options, ("prefer",))
        prefer = read_choice(ENTROPY, "prefer", options.get("prefer", CODERS[0]), CODERS[:-1])
    except ConfigError as error:
        raise ConfigError(f"codec {whole!r}: {error}") from error
    order = sorted(CODERS, key=lambda name: (name == CODERS[-1], name != prefer))
    return EntropyChoice(prefer, tuple(known[name] for name in order if name in known))
