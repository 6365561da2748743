"""The one line of text that users write for a codec.

    text  = preset | item "+" item ...
    item  = name | name ":" key "=" value "," key "=" value ...

A name is a stage's, or one of two words that are no stages: ``feedback`` and ``entropy``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from fedpara_plugins.codecs.chain import FEEDBACK, NONE, Codec, EntropyChoice
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.stages.options import choice, known_options
from fedpara_plugins.stages.stage import Stage

__all__ = ["PRESETS", "parse_codec"]

ENTROPY = "entropy"

PRESETS: Mapping[str, str] = {
    NONE: "",
    # Most bits of a float are noise: what is left to save stands in the exponents.
    "lossless": "planes+entropy:prefer=zstd",
    "int8": "delta+int8+zlib",
    # 2.5 % of the root mean square is the largest error of a value, 1.44 % the usual one.
    "balanced": "delta+quantise:rms=0.05+entropy:prefer=zstd",
    "small": "delta+feedback+quantise:rms=2+entropy:prefer=ans",
    "tiny": "delta+feedback+quantise:rms=4+entropy:prefer=ans",
}
"""Names for a whole codec. A preset wins over a stage of the same name that stands alone."""

CODERS = ("ans", "zstd", "zlib")
"""Candidates of the word ``entropy``: smallest first; everyone has the last one."""

Item = tuple[str, dict[str, str]]


def parse_codec(text: str, stages: Mapping[str, Stage] | None = None) -> Codec:
    """Read a preset, or stages joined by ``+``, such as ``delta+quantise:bits=4+entropy``.

    Args:
        text: what the user wrote; spaces around names, keys and values are ignored.
        stages: known stages by name; all that are registered if None.

    Raises:
        ConfigError: nothing given, unknown stage, unknown option or a value that does not fit,
            stage repeated or out of its place; the message names what is known.
    """
    known = _registered() if stages is None else stages
    whole = PRESETS.get(text.strip(), text)
    if not whole and text.strip():
        return Codec(())
    items = [_item(part, whole) for part in whole.split("+")]
    names = [name for name, _ in items]
    for word in (FEEDBACK, ENTROPY):
        if names.count(word) > 1:
            raise ConfigError(f"codec {whole!r}: {word!r} stands there twice")
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
            f"codec {whole!r}: 'feedback' must stand after {codec.stages[first - 1].name!r}: it "
            "keeps what the stages that follow it lose"
        )
    if place > first:
        raise ConfigError(
            f"codec {whole!r}: 'feedback' must stand before {names[first]!r}: it keeps what the "
            "stages that follow it lose"
        )


def _entropy(options: Mapping[str, str], known: Mapping[str, Stage], whole: str) -> EntropyChoice:
    try:
        known_options(ENTROPY, options, ("prefer",))
        prefer = choice(ENTROPY, "prefer", options.get("prefer", CODERS[0]), CODERS[:-1])
    except ConfigError as error:
        raise ConfigError(f"codec {whole!r}: {error}") from error
    order = sorted(CODERS, key=lambda name: (name == CODERS[-1], name != prefer))
    return EntropyChoice(prefer, tuple(known[name] for name in order if name in known))


def _registered() -> Mapping[str, Stage]:
    # The registry imports the built-in stages of this package, so it cannot be imported above.
    from fedpara_plugins.plugins import stages

    return stages()
