"""Chains of stages, and the one-line text that users write for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedpara_plugins.codecs.stage import Notes, Stage, Tensors, byte_size, check_limit
from fedpara_plugins.errors import ConfigError, PayloadError

__all__ = ["PRESETS", "Codec", "parse_codec"]

NONE = "none"

PRESETS: Mapping[str, tuple[str, ...]] = {
    NONE: (),
    "lossless": ("zlib",),
    "int8": ("delta", "int8", "zlib"),
}
"""Names for a whole codec. A preset wins over a stage of the same name that stands alone."""


@dataclass(frozen=True)
class Codec:
    """Stages in the order of encoding; decoding walks them backwards.

    Attributes:
        stages: may be empty; stages that need the reference come first, an entropy coder last.
        name: the stages' names joined by ``+``, or ``none``.

    Raises:
        ConfigError: a stage stands twice or out of its place.
    """

    stages: tuple[Stage, ...]
    name: str = field(init=False)

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        object.__setattr__(self, "name", "+".join(names) or NONE)
        for place, stage in enumerate(self.stages):
            if stage.name in names[:place]:
                raise ConfigError(f"codec {self.name!r}: stage {stage.name!r} stands there twice")
            if stage.entropy and place < len(names) - 1:
                raise ConfigError(
                    f"codec {self.name!r}: {stage.name!r} makes one opaque stream and must be the "
                    f"last stage, but {names[place + 1]!r} follows"
                )
            # Any other stage changes dtypes or values, and the reference would no longer fit.
            if stage.needs_reference and not all(s.needs_reference for s in self.stages[:place]):
                raise ConfigError(
                    f"codec {self.name!r}: {stage.name!r} needs the plain tensors and must stand "
                    f"before {names[0]!r}"
                )

    @property
    def needs_reference(self) -> bool:
        """Whether any stage works against a reference."""
        return any(stage.needs_reference for stage in self.stages)

    @property
    def lossless(self) -> bool:
        """Whether all stages are lossless."""
        return all(stage.lossless for stage in self.stages)

    def first_contact(self) -> Codec:
        """What is used while the receiver holds no reference: the lossless, self-sufficient stages.

        Lossy stages are made for small updates; they would spoil whole weights.
        """
        kept = (stage for stage in self.stages if stage.lossless and not stage.needs_reference)
        return Codec(tuple(kept))

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, list[Notes]]:
        """Apply the stages in order; one dict of notes a stage.

        Raises:
            PayloadError: a stage cannot code a tensor.
            MismatchError: the reference is missing or does not fit.
        """
        every: list[Notes] = []
        for stage in self.stages:
            tensors, notes = stage.encode(tensors, reference=reference)
            every.append(notes)
        return tensors, every

    def decode(
        self,
        tensors: Tensors,
        notes: Sequence[Notes],
        *,
        reference: Tensors | None,
        limit: int,
    ) -> Tensors:
        """Undo the stages, the last one first.

        Args:
            tensors: what travelled.
            notes: what `encode` returned.
            reference: what the sender coded against.
            limit: bytes that the tensors may have after any stage.

        Raises:
            PayloadError: whatever is wrong with tensors or notes; no other error passes.
        """
        if len(notes) != len(self.stages):
            raise PayloadError(
                f"codec {self.name!r}: expected notes of {len(self.stages)} stages, "
                f"got {len(notes)}"
            )
        for stage, note in zip(reversed(self.stages), reversed(notes), strict=True):
            try:
                tensors = stage.decode(tensors, note, reference=reference, limit=limit)
            except PayloadError:
                raise
            except Exception as error:
                # A third party's stage may miss a hostile case; the caller still gets one type.
                raise PayloadError(f"stage {stage.name!r} failed to decode: {error!r}") from error
            size = sum(byte_size(tensor.dtype, tensor.shape) for tensor in tensors.values())
            check_limit(size, limit, f"the output of stage {stage.name!r}")
        return tensors


def parse_codec(text: str, stages: Mapping[str, Stage] | None = None) -> Codec:
    """Read a preset, or stages joined by ``+``, such as ``delta+int8+zlib``.

    Args:
        text: what the user wrote; spaces around names are ignored.
        stages: known stages by name; all that are registered if None.

    Raises:
        ConfigError: nothing given, unknown stage, stage repeated or out of its place.
    """
    known = _registered() if stages is None else stages
    names = [part.strip() for part in text.split("+")]
    if len(names) == 1 and names[0] in PRESETS:
        names = list(PRESETS[names[0]])
    return chain_of(names, known)


def chain_of(names: Iterable[str], stages: Mapping[str, Stage]) -> Codec:
    """The codec of exactly these stages; presets are not looked at.

    Raises:
        ConfigError: a stage is unknown, repeated or out of its place.
    """
    wanted = list(names)
    unknown = [name for name in wanted if name not in stages]
    if unknown:
        raise ConfigError(
            f"codec: unknown stage {unknown[0]!r} in {'+'.join(wanted)!r}. Presets: "
            f"{', '.join(PRESETS)}. Stages, to be joined by '+': {', '.join(stages)}"
        )
    return Codec(tuple(stages[name] for name in wanted))


def _registered() -> Mapping[str, Stage]:
    # The registry imports the built-in stages of this package, so it cannot be imported above.
    from fedpara_plugins.plugins import stages

    return stages()
