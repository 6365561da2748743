"""Chains of stages: the order of stages, and the checks around each of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.stages.checks import check_dimensions
from fedpara_plugins.stages.entropy_decoders import decoders
from fedpara_plugins.stages.handed_over import HandedOver, working_limit
from fedpara_plugins.stages.stage import Notes, Stage, Tensors, check_limit

__all__ = ["FEEDBACK", "NONE", "Codec", "EntropyChoice", "codec_from_names"]

NONE = "none"
FEEDBACK = "feedback"


@dataclass(frozen=True)
class EntropyChoice:
    """The word ``entropy``: stands for the best entropy coder that both sides have.

    Attributes:
        prefer: name of the preferred coder.
        candidates: coders in the order of preference; every installation has the last one.
    """

    prefer: str
    candidates: tuple[Stage, ...]

    @property
    def text(self) -> str:
        """The word as users write it."""
        return f"entropy:prefer={self.prefer}"

    def resolved(self, theirs: Collection[str] | None) -> Stage:
        """Return the first candidate that the other side can decode and this side has.

        Args:
            theirs: names of the coders that the other side can decode; None if unknown.
        """
        *better, always = self.candidates
        wanted = [stage for stage in better if theirs is not None and stage.name in theirs]
        if not wanted:
            return always
        mine = decoders()
        return next((stage for stage in wanted if stage.name in mine), always)


@dataclass(frozen=True)
class Codec:
    """Stages in the order of encoding; decoding applies them in reverse order.

    Attributes:
        stages: may be empty; stages that need the reference come first, an entropy coder last.
        feedback: whether the sender keeps what lossy stages lose and adds it to its next payload;
            see `fedpara_plugins.codecs.feedback`. The receiver need not know.
        entropy: the entropy coder, if it is chosen once the other side is known; see `resolved`.
        name: the text from which `parse_codec` returns this codec, or ``none``.

    Raises:
        ConfigError: a stage is repeated or out of place.
    """

    stages: tuple[Stage, ...]
    feedback: bool = False
    entropy: EntropyChoice | None = None
    name: str = field(init=False)

    def __post_init__(self) -> None:
        items = [stage.text for stage in self.stages]
        if self.feedback:
            items.insert(sum(stage.needs_reference for stage in self.stages), FEEDBACK)
        if self.entropy is not None:
            items.append(self.entropy.text)
        object.__setattr__(self, "name", "+".join(items) or NONE)
        self._check_order()

    def _check_order(self) -> None:
        for place in range(len(self.stages)):
            self._check_ends(place)
            self._check_values(place)
        if self.feedback and all(s.lossless or s.needs_reference for s in self.stages):
            raise self._wrong(
                "'feedback' keeps what lossy stages lose, and there is none; add one, such as "
                "quantise:rms=2, or leave 'feedback' out"
            )

    def _check_ends(self, place: int) -> None:
        """Raise if the stage is repeated, or must be the first or the last one and is not."""
        stage, before, after = self.stages[place], self.stages[:place], self.stages[place + 1 :]
        if any(other.name == stage.name for other in before):
            raise self._wrong(f"stage {stage.name!r} occurs twice")
        if stage.entropy and (after or self.entropy is not None):
            follows = after[0].name if after else "entropy"
            raise self._wrong(
                f"{stage.name!r} makes one opaque stream and must be the last stage, but "
                f"{follows!r} follows"
            )
        # Any other stage changes dtypes or values, and the reference would no longer fit.
        if stage.needs_reference and before:
            both = "; keep one of them" if before[0].needs_reference else ""
            raise self._wrong(
                f"{stage.name!r} needs the plain tensors and must come before "
                f"{before[0].name!r}{both}"
            )

    def _check_values(self, place: int) -> None:
        """Raise if the stages before have changed the values in a way that does not suit."""
        stage, before = self.stages[place], self.stages[:place]
        if before and before[-1].sorts and not stage.entropy:
            raise self._wrong(
                f"{before[-1].name!r} turns values into bytes and must come right before the "
                f"entropy coder, but {stage.name!r} follows"
            )
        shorter = [other.name for other in before if other.shortens]
        if shorter and stage.shortens:
            raise self._wrong(
                f"{shorter[0]!r} and {stage.name!r} both write values with fewer bits; "
                "keep one of them"
            )
        if shorter and stage.selects:
            raise self._wrong(
                f"{stage.name!r} compares exact values and must come before {shorter[0]!r}"
            )

    def _wrong(self, why: str) -> ConfigError:
        return ConfigError(f"codec {self.name!r}: {why}")

    @property
    def stage_names(self) -> str:
        """Names of the stages joined by ``+``, or ``none``, as in a payload's header."""
        return "+".join(stage.name for stage in self.stages) or NONE

    @property
    def needs_reference(self) -> bool:
        """Whether any stage needs a reference."""
        return any(stage.needs_reference for stage in self.stages)

    @property
    def lossless(self) -> bool:
        """Whether all stages are lossless."""
        return all(stage.lossless for stage in self.stages)

    def resolved(self, decoders: Collection[str] | None) -> Codec:
        """Return this codec with a stage in place of the word ``entropy``.

        Args:
            decoders: entropy stages that the other side can decode, from its
                `fedpara_plugins.codecs.decoders`. None if they are not known yet; then zlib is
                taken, which every installation has.
        """
        if self.entropy is None:
            return self
        coder = self.entropy.resolved(decoders)
        return replace(self, stages=(*self.stages, coder), entropy=None)

    def first_contact(self) -> Codec:
        """Return the codec to use while the receiver holds no reference.

        It keeps the lossless stages that need no reference. Lossy stages are made for small
        updates; they would spoil whole weights.
        """
        kept = (stage for stage in self.stages if stage.lossless and not stage.needs_reference)
        return replace(self, stages=tuple(kept), feedback=False)

    def encode(self, tensors: Tensors, *, reference: Tensors | None) -> tuple[Tensors, list[Notes]]:
        """Apply the stages in order.

        Returns:
            The encoded tensors, and the notes of each stage.

        Raises:
            ConfigError: the entropy coder is not chosen yet.
            PayloadError: a stage cannot encode a tensor.
            MismatchError: the reference is missing or does not fit.
        """
        if self.entropy is not None:
            raise self._wrong("the entropy coder is not chosen yet; call resolved() first")
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
        reference: Tensors | Callable[[], Tensors] | None,
        limit: int,
    ) -> Tensors:
        """Undo the stages, the last one first.

        Args:
            tensors: the encoded tensors, as received. `HandedOver` tensors are used up, others
                stay as they are.
            notes: the notes of each stage, as received.
            reference: the tensors that the sender encoded against, or what loads them; they are
                loaded when a stage needs them.
            limit: bytes that the tensors may have after any stage.

        Raises:
            PayloadError: tensors or notes are not what `encode` returns. Errors of any other type
                that a stage raises are converted.
        """
        if len(notes) != len(self.stages):
            raise PayloadError(
                f"codec {self.name!r}: expected notes of {len(self.stages)} stages, "
                f"got {len(notes)}"
            )
        if not isinstance(tensors, HandedOver):
            tensors = HandedOver(tensors, lent=_places(tensors), working=working_limit(limit))
        lent, working = tensors.lent, tensors.working
        limit = min(limit, working)
        for stage, note in zip(reversed(self.stages), reversed(notes), strict=True):
            if stage.needs_reference and callable(reference):
                reference = reference()
                tensors.working = _working_beside(reference, working)
            against = None if callable(reference) else reference
            try:
                decoded = stage.decode(tensors, note, reference=against, limit=limit)
            except PayloadError:
                raise
            except Exception as error:
                # A third party's stage may miss a hostile case; the caller still gets one type.
                raise PayloadError(f"stage {stage.name!r} failed to decode: {error!r}") from error
            _check_output(stage, decoded, limit)
            if not stage.owns_output:
                lent |= _places(decoded)
            tensors = HandedOver(decoded, lent=lent, working=working)
            del decoded  # would keep alive what the next stage has used up
        return tensors


def _working_beside(reference: Tensors, working: int) -> int:
    """Return the bytes that decoding may take beside a reference that has just been loaded.

    What is coded against it is as large as it is, so a payload that is sound gets what it needs.
    """
    size = sum(tensor.nbytes for tensor in reference.values())
    return max(working - size, working_limit(size))


def _check_output(stage: Stage, tensors: Tensors, limit: int) -> None:
    for name, tensor in tensors.items():
        check_dimensions(name, tensor.ndim)
    size = sum(tensor.nbytes for tensor in tensors.values())
    check_limit(size, limit, f"the output of stage {stage.name!r}")


def _places(tensors: Tensors) -> frozenset[int]:
    """Return the addresses of the tensors' memory."""
    return frozenset(tensor.untyped_storage().data_ptr() for tensor in tensors.values())


def codec_from_names(names: Iterable[str], stages: Mapping[str, Stage]) -> Codec:
    """Return the codec of exactly these stages, without options, as a payload's header names them.

    Args:
        names: of the stages, in the order of encoding.
        stages: known stages by name.

    Raises:
        ConfigError: a stage is unknown, repeated or out of place.
    """
    wanted = list(names)
    unknown = [name for name in wanted if name not in stages]
    if unknown:
        raise ConfigError(
            f"codec: unknown stage {unknown[0]!r} in {'+'.join(wanted)!r}; known are "
            f"{', '.join(stages)}"
        )
    return Codec(tuple(stages[name] for name in wanted))
