"""Every user-facing option of the core: one frozen dataclass, validated, read from any mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from fedpara_plugins.errors import ConfigError

__all__ = ["FedParaConfig"]

DEFAULT_GAMMA = 0.1

LAYER_OPTIONS = frozenset(
    {"method", "gamma", "ratio", "rank", "min_size", "speed", "private_speed", "tanh"}
)
RANK_RULES = frozenset({"gamma", "ratio", "rank"})

Overrides = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

_BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True, kw_only=True)
class FedParaConfig:
    """What to do to a model and to its messages.

    Attributes:
        method: ``none``, ``lowrank``, ``fedpara``, ``pfedpara``, or one that a plugin registered.
        gamma: the paper's rank rule, 0 (smallest rank that can be full) to 1 (dense budget);
            0.1 where neither ratio nor rank is given.
        ratio: the official notebook's rule instead: wanted share of the dense parameters, (0, 1].
        rank: an explicit rank for every layer instead.
        include: name patterns (shell style); only layers that match one are factorised.
        exclude: name patterns; layers that match one stay dense.
        overrides: other options for the layers whose name matches a pattern, as a mapping
            ``{"body.*": {"gamma": 0.5}, "head": {"method": "none"}}`` or as text
            ``"body.*: gamma=0.5; head: method=none"``. The last pattern that matches wins.
        min_size: weights with fewer parameters stay dense.
        tanh: put every operand through tanh, as the paper does in most experiments; its own
            ablation shows no effect.
        speed: K, how far a composed weight moves per step of SGD, dense = 1; None takes the
            method's default (1/2 for fedpara, 1/4 for lowrank and pfedpara's shared half).
        private_speed: the same for the private half of pfedpara.
        decay: what the optimizer's weight decay shrinks: ``composed`` weights, as the same setting
            would shrink dense ones, or each of the ``factors``.
        clip: bound of the gradient's norm over the whole model at each step; None for none.
        schedule: of pfedpara: ``joint``, the paper's, trains both halves in every step;
            ``decoupled`` begins each round with private steps, the shared half frozen as received,
            and goes on with shared steps, the private half switched off (the shared half is then
            a rank-R model by itself).
        private_steps: of ``decoupled``: number of private steps, or (below 1) their share of the
            steps that the previous round had.
        first_private_steps: of ``decoupled``, in a first round, where no previous one counts.
        init: ``random`` (fresh factors) or ``fit`` (the closest factors to the weights that the
            model has); None is ``random`` with a warning if the weights look trained.
        seed: of the private factors' first values, which every client derives by itself.
        private: name patterns of further state that stays on the device, factorised or not: ``head.*``
            is FedPer, ``*.norm*`` is FedBN. Full names of the state are meant, ``head.weight``.
        codec: what messages are coded with, ``none``, a preset, or stages joined by ``+``.
        uplink_codec: another one for messages to the server; None is ``codec``.
        downlink_codec: another one for messages to clients; None is ``codec``.

    Raises:
        ConfigError: an option is out of range, or two options exclude each other.
    """

    method: str = "none"
    gamma: float = DEFAULT_GAMMA
    ratio: float | None = None
    rank: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    overrides: Overrides = ()
    min_size: int = 1024
    tanh: bool = False
    speed: float | None = None
    private_speed: float = 0.2
    decay: str = "composed"
    clip: float | None = None
    schedule: str = "joint"
    private_steps: float = 0.2
    first_private_steps: int = 10
    init: str | None = None
    seed: int = 0
    private: tuple[str, ...] = ()
    codec: str = "none"
    uplink_codec: str | None = None
    downlink_codec: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "overrides", _parsed_overrides(self.overrides))
        for pattern, _ in self.overrides:
            self._overridden(pattern)
        self._check("gamma", 0 <= self.gamma <= 1, "a number from 0 to 1")
        self._check("ratio", self.ratio is None or 0 < self.ratio <= 1, "a number in (0, 1]")
        self._check("rank", self.rank is None or self.rank >= 1, "an integer of at least 1")
        self._check("min_size", self.min_size >= 0, "an integer of at least 0")
        self._check("speed", self.speed is None or self.speed > 0, "a number above 0")
        self._check("private_speed", self.private_speed > 0, "a number above 0")
        self._check("decay", self.decay in ("composed", "factors"), "'composed' or 'factors'")
        self._check("clip", self.clip is None or self.clip > 0, "a number above 0")
        self._check("schedule", self.schedule in ("joint", "decoupled"), "'joint' or 'decoupled'")
        self._check("private_steps", self.private_steps > 0, "a share below 1 or a number of steps")
        self._check("first_private_steps", self.first_private_steps >= 1, "at least 1")
        self._check("init", self.init in (None, "random", "fit"), "'random' or 'fit'")
        if self.ratio is not None and self.rank is not None:
            raise ConfigError("options 'ratio' and 'rank' exclude each other: give one of them")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            value = getattr(self, name)
            raise ConfigError(f"option {name!r}: expected {expected}, got {value!r}")

    def for_layer(self, name: str) -> FedParaConfig:
        """The options for the layer of that name, overrides applied."""
        config = self
        for pattern, _ in self.overrides:
            if fnmatchcase(name, pattern):
                config = self._overridden(pattern)
        return config

    def _overridden(self, pattern: str) -> FedParaConfig:
        options = dict(dict(self.overrides)[pattern])
        if refused := options.keys() - LAYER_OPTIONS:
            raise ConfigError(
                f"option 'overrides': {pattern!r} sets {', '.join(sorted(refused))}; a layer can "
                f"have its own {', '.join(sorted(LAYER_OPTIONS))}"
            )
        whole = {field.name: getattr(self, field.name) for field in fields(self)}
        # One rank rule replaces another instead of standing beside it.
        rules = {"ratio": None, "rank": None} if options.keys() & RANK_RULES else {}
        given = {name: _converted(name, _declared(name), value) for name, value in options.items()}
        return type(self)(**{**whole, "overrides": (), **rules, **given})

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], *, prefix: str = "") -> FedParaConfig:
        """Read the options whose keys start with ``prefix``; ``-`` and ``_`` are the same.

        Strings are converted to the option's type, since some frameworks' flags arrive as text;
        an empty string means the default. Patterns may be one string with commas.

        Raises:
            ConfigError: unknown option (the nearest known one is named), wrong type or value.
        """
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {}
        for key, value in options.items():
            if not key.startswith(prefix):
                continue
            name = key[len(prefix) :].replace("-", "_")
            if name not in known:
                raise ConfigError(_unknown_option(name, prefix, known))
            if value is not None and value != "":
                values[name] = _converted(name, _declared(name), value)
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """The options that differ from their defaults, in plain types."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                changed[field.name] = list(value) if isinstance(value, tuple) else value
        return changed


def _declared(name: str) -> str:
    return str(FedParaConfig.__dataclass_fields__[name].type)


def _parsed_overrides(overrides: Any) -> Overrides:
    """Any of the accepted forms as nested tuples, which keep the config hashable."""
    items = overrides.items() if isinstance(overrides, Mapping) else overrides
    if isinstance(overrides, str):
        items = [_split_override(part) for part in overrides.split(";") if part.strip()]
    try:
        return tuple(
            (str(pattern), tuple(sorted(dict(options).items()))) for pattern, options in items
        )
    except (TypeError, ValueError):
        raise ConfigError(
            f"option 'overrides': expected a mapping of patterns to options or text such as "
            f"'body.*: gamma=0.5; head: method=none', got {overrides!r}"
        ) from None


def _split_override(text: str) -> tuple[str, list[list[str]]]:
    pattern, _, options = text.partition(":")
    pairs = [part.replace("-", "_").split("=") for part in options.split(",")]
    return pattern.strip(), [[word.strip() for word in pair] for pair in pairs]


def _unknown_option(name: str, prefix: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return f"unknown option {prefix}{name}{hint} Known: {', '.join(known)}"


def _converted(name: str, declared: str, value: Any) -> Any:
    if declared == "Overrides":
        return _parsed_overrides(value)
    try:
        if declared.startswith("tuple"):
            parts = value.split(",") if isinstance(value, str) else value
            return tuple(str(part).strip() for part in parts if str(part).strip())
        if declared == "bool":
            return _BOOLEANS[str(value).lower()]
        if declared.startswith("float"):
            return float(value)
        if declared.startswith("int"):
            if isinstance(value, bool) or int(value) != float(value):
                raise ValueError
            return int(value)
        return str(value)
    except (KeyError, TypeError, ValueError):
        kind = declared.split(" ")[0].split("[")[0]
        raise ConfigError(f"option {name!r}: expected {kind}, got {value!r}") from None
