"""The options of the core: one frozen dataclass, validated, read from any mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from math import inf
from typing import Any

from fedpara_plugins.errors import ConfigError
from fedpara_plugins.support.option_values import (
    Overrides,
    convert_value,
    parse_clip,
    parse_overrides,
    to_float,
)

__all__ = ["FedParaConfig"]

DEFAULT_GAMMA = 0.1

LAYER_OPTIONS = frozenset(
    {
        "method",
        "gamma",
        "ratio",
        "rank",
        "min_size",
        "variance",
        "speed",
        "private_speed",
        "tanh",
        "recompute",
        "core",
    }
)
EVERYTHING = ("*",)
VARIANCE_RULES = ("torch", "he", "auto")
VARIANCES = (1e-9, 1e4)
SPEEDS = (1e-3, 1e3)
"""The limits within which the factors of every shape fit into float32."""
RANK_RULES = frozenset({"gamma", "ratio", "rank"})


@dataclass(frozen=True, kw_only=True)
class FedParaConfig:
    """The options of a conversion, of training and of messages.

    Attributes:
        method: ``none``, ``lowrank``, ``fedpara``, ``pfedpara``, or one that a plugin registered.
            With ``none`` nothing is converted, whatever the overrides say.
        gamma: the paper's rank rule, from 0 (smallest rank that can be full) to 1 (dense budget);
            0.1 if neither ratio nor rank is given.
        ratio: the official notebook's rank rule: share of the dense parameters, in (0, 1]. A weight
            whose smallest full-rank factors hold more is an error that names it.
        rank: an explicit rank for every layer, limited by the weight's smaller side.
        include: name patterns (shell style); only layers that match one are factorised.
        exclude: name patterns; layers that match one stay dense.
        overrides: other options for the layers whose name matches a pattern, as a mapping
            ``{"body.*": {"gamma": 0.5}, "head": {"method": "none"}}`` or as text
            ``"body.*: gamma=0.5; head: method=none"``. The last pattern that matches wins.
        min_size: weights with fewer parameters stay dense.
        tanh: apply tanh to every operand, as the paper does in most experiments; its own ablation
            shows no effect.
        variance: variance of fresh composed weights: ``torch``, that of the kind of layer, or the
            dense weight's own where its standard deviation is far from it; ``auto``, the same with
            2 / fan_in (He's) for linear layers and convolutions of a model without norm layers;
            ``he``, 2 / fan_in for all weights; or a number, such as 0.0004 for a standard deviation
            of 0.02.
        speed: K, how far a composed weight moves per step of SGD, dense = 1; None is the method's
            default, which is 1 for all built-in ones.
        private_speed: K of pfedpara's private half.
        local: what a client trains in its round: ``factors``, or a ``dense`` model, which is never
            converted and whose update the plugin projects onto the factors afterwards
            (`factors.projection`). Messages are the same; `convert` ignores this option.
        recompute: whether backward computes the two products of a weight again, which takes
            longer, or holds them since forward, which takes twice the weight's memory. None
            recomputes for weights of 4 MiB and more, where it costs little, and for updates of
            frozen weights. With
            fedpara-plugins-kernels it takes no longer, and nothing is ever held.
        decay: what the optimizer's weight decay shrinks: ``composed`` weights, as the same setting
            would shrink dense ones, or each of the ``factors``.
        clip: bound of each step. ``relative`` bounds lr |gradient| of every factor by a share of
            the factor's norm, .03 (pfedpara: .1), and ``relative:0.02`` sets another share. A
            number bounds the gradient's norm over the whole model. None, or ``none``, is no bound.
        schedule: how pfedpara trains. ``joint``, the paper's, trains both halves in every step.
            ``decoupled`` begins each round with private steps, with the shared half frozen as
            received, and continues with shared steps, with the private half switched off (the
            shared half is then a rank-R model by itself).
        private_steps: number of private steps of ``decoupled``, or (below 1) their share of the
            previous round's steps.
        first_private_steps: number of private steps of ``decoupled`` without a previous round.
        private_head: train a correction of the head's weight that each client keeps, with
            ``decoupled``. It starts at zero, is trained in private steps and is switched off in
            shared ones.
        label_prior: add log((n_k + 0.1) / (n + 1)) to the logits, where n_k of the client's n
            training labels are of class k (`fedpara_plugins.set_label_counts`), in training and
            prediction, with any method and schedule.
        head: name of the layer that ``private_head`` and ``label_prior`` are about; by default the
            last ``nn.Linear``.
        base: what factors compose: the weight itself (``factors``), or an update of a weight that
            stays as it is and is never trained (``frozen``, the residual form; with ``lowrank`` it
            is LoRA, with ``fedpara`` LoHa). The update starts at zero. None is ``frozen`` with
            ``init="auto"`` and weights that look trained, else ``factors``.
        train: with ``base="frozen"``, ``both`` sides of a product, or the ``right`` one alone, as
            in FFA-LoRA: X of the first operand (LoRA's B). The other shared factors are drawn from
            ``seed`` and fixed, and the average of clients' updates is exact.
        trainable: with ``base="frozen"``, name patterns of the other parameters that are trained,
            such as ``head.*,*norm*``; all others are frozen. Those that match only ``*``, the
            default, stay as the model has them; ``none`` freezes all. Those that ``private`` names
            are trained as well.
        core: whether a kernel's operands have a core; None is true, but not for the residual form
            of ``lowrank``, which is LoRA's. False needs ``base="frozen"``.
        init: first values: ``auto`` (``seeded`` for fresh weights, ``base="frozen"`` for trained
            ones), ``seeded`` (fresh factors that every side derives from ``seed``, so that they
            need not be sent), ``random`` (fresh factors from torch's global generator) or ``fit``
            (the closest factors to the model's weights; a relative error above 0.1 is warned of).
        trained: what happens if ``init`` would replace weights that look trained: ``keep`` (an
            error says so), or ``discard`` (they are replaced).
        seed: seed of the private factors' initial values, which every client derives by itself,
            and of the shared factors with ``init="seeded"``.
        private: name patterns of further tensors that stay on the device: ``head.*`` is FedPer,
            ``*.norm*`` is FedBN. They match full names of the state, such as ``head.weight``. A
            client starts with what its own model holds for them.
        codec: codec of messages: ``none``, a preset, or stages joined by ``+``.
        uplink_codec: codec of messages to the server; None is ``codec``.
        downlink_codec: codec of messages to clients; None is ``codec``.

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
    variance: str | float = "auto"
    speed: float | None = None
    private_speed: float = 1.0
    local: str = "factors"
    recompute: bool | None = None
    decay: str = "composed"
    clip: float | str | None = "relative"
    schedule: str = "joint"
    private_steps: float = 0.2
    first_private_steps: int = 10
    private_head: bool = False
    label_prior: bool = False
    head: str = ""
    base: str | None = None
    train: str = "both"
    trainable: tuple[str, ...] = EVERYTHING
    core: bool | None = None
    init: str = "auto"
    trained: str = "keep"
    seed: int = 0
    private: tuple[str, ...] = ()
    codec: str = "none"
    uplink_codec: str | None = None
    downlink_codec: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = _converted(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)
        self._check("gamma", 0 <= self.gamma <= 1, "a number from 0 to 1")
        self._check("ratio", self.ratio is None or 0 < self.ratio <= 1, "a number in (0, 1]")
        self._check("rank", self.rank is None or self.rank >= 1, "an integer of at least 1")
        self._check("min_size", self.min_size >= 0, "an integer of at least 0")
        self._check("variance", _in(VARIANCES, self.variance), _VARIANCE_TEXT)
        self._check("speed", self.speed is None or _in(SPEEDS, self.speed), _between(SPEEDS))
        self._check("private_speed", _in(SPEEDS, self.private_speed), _between(SPEEDS))
        self._check("local", self.local in ("factors", "dense"), "'factors' or 'dense'")
        self._check("decay", self.decay in ("composed", "factors"), "'composed' or 'factors'")
        self._check("schedule", self.schedule in ("joint", "decoupled"), "'joint' or 'decoupled'")
        steps = "a share above 0 and below 1, or a number of steps"
        self._check("private_steps", 0 < self.private_steps < inf, steps)
        self._check("first_private_steps", self.first_private_steps >= 1, "at least 1")
        self._check_first_values()
        self._check("seed", -(2**63) <= self.seed < 2**63, "an integer of 64 bits")
        if self.private_head and self.schedule != "decoupled":
            raise ConfigError(
                "option 'private_head': the head is corrected in private steps, which only "
                "schedule='decoupled' has: set that too, or private_head=False"
            )
        if self.local == "dense":
            self._check_dense()
        if self.ratio is not None and self.rank is not None:
            raise ConfigError("options 'ratio' and 'rank' exclude each other: give one of them")
        for pattern, _ in self.overrides:
            self._overridden(pattern)

    def _check_first_values(self) -> None:
        """Check the options about first values and the residual form, and how they go together."""
        if self.trainable == ("none",):
            object.__setattr__(self, "trainable", ())
        self._check("base", self.base in (None, "factors", "frozen"), "'factors' or 'frozen'")
        self._check("train", self.train in ("both", "right"), "'both' or 'right'")
        inits = ("auto", "random", "seeded", "fit")
        self._check("init", self.init in inits, "'auto', 'random', 'seeded' or 'fit'")
        self._check("trained", self.trained in ("keep", "discard"), "'keep' or 'discard'")
        if self.base == "frozen" and self.init == "fit":
            raise ConfigError(
                "option 'init': 'fit' writes the weights into factors, and with base='frozen' they "
                "stay as they are beside them: choose one of the two"
            )
        if self.train == "right" and self.tanh:
            raise ConfigError(
                "option 'train': with 'right' the average of updates is exact, which tanh=True "
                "would undo: leave out one of the two"
            )
        only_frozen = {
            "train": self.train == "right",
            "trainable": self.trainable != EVERYTHING,
            "core": self.core is False,
        }
        wanted = next((name for name, given in only_frozen.items() if given), None)
        if wanted and self.base == "factors":
            raise ConfigError(
                f"option {wanted!r}: it is about the residual form, where weights stay as they are "
                f"and factors are an update: set base='frozen' too, or leave it out"
            )

    def _check_dense(self) -> None:
        """Raise for options that act inside a converted model, which clients do not train."""
        if self.base == "frozen":
            raise ConfigError(
                "option 'local': 'dense' does not go with base='frozen': clients would train the "
                "weights that are frozen. Set local='factors', or base='factors' with init='fit'"
            )
        if self.schedule == "decoupled":
            raise ConfigError(
                "option 'local': 'dense' does not go with schedule='decoupled' (and private_head, "
                "which needs it): private and shared steps differ in whose factors have gradients, "
                "and a dense model has no factors: set schedule='joint', or local='factors'"
            )
        if self.label_prior:
            raise ConfigError(
                "option 'local': 'dense' does not go with label_prior: the converted head adds it "
                "to its logits, and a model that is never converted has no such head: leave it "
                "out, or set local='factors'"
            )

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            value = getattr(self, name)
            raise ConfigError(f"option {name!r}: expected {expected}, got {repr(value)[:80]}")

    def without_values(self) -> FedParaConfig:
        """Return the options for a conversion whose first factors do not matter.

        They are drawn, and weights may look trained; but where ``base`` is left to the weights, it
        still is.
        """
        undecided = self.base is None and self.init == "auto" and self.local == "factors"
        if undecided and self.trained == "keep":
            return self
        return replace(self, init="random", trained="discard")

    def for_layer(self, name: str) -> FedParaConfig:
        """Return the options for the layer with that name, overrides applied."""
        config = self
        for pattern, _ in self.overrides:
            if fnmatchcase(name, pattern):
                config = self._overridden(pattern)
        return config

    def _overridden(self, pattern: str) -> FedParaConfig:
        options = {k.replace("-", "_"): v for k, v in dict(self.overrides)[pattern]}
        if refused := options.keys() - LAYER_OPTIONS:
            raise ConfigError(
                f"option 'overrides': {pattern!r} sets {', '.join(sorted(refused))}; a layer can "
                f"have its own {', '.join(sorted(LAYER_OPTIONS))}"
            )
        whole = {field.name: getattr(self, field.name) for field in fields(self)}
        # A rank rule replaces the other rank rules.
        rules = {"ratio": None, "rank": None} if options.keys() & RANK_RULES else {}
        try:
            return type(self)(**{**whole, "overrides": (), **rules, **options})
        except ConfigError as error:
            raise ConfigError(f"option 'overrides': pattern {pattern!r}: {error}") from None

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], *, prefix: str = "") -> FedParaConfig:
        """Return a config from the options whose keys start with ``prefix``.

        In keys ``-`` and ``_`` are the same. Text is converted to the option's type, since some
        frameworks pass flags as text; an empty text means the default. Patterns may be one text
        with commas.

        Raises:
            ConfigError: an option is unknown (the message names the nearest), or has a wrong type
                or value.
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
                values[name] = value
        return cls(**values)

    def to_mapping(self) -> dict[str, Any]:
        """Return the options that differ from their defaults, in plain types."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is MISSING or value != field.default:
                plain = list(value) if isinstance(value, tuple) else value
                # A mapping's None stands for the default.
                changed[field.name] = "none" if plain is None else plain
        return changed


def _unknown_option(name: str, prefix: str, known: list[str]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else "."
    return f"unknown option {prefix}{name}{hint} Known: {', '.join(known)}"


def _converted(name: str, value: Any) -> Any:
    """Return the value in the option's declared type, from that type or from text."""
    declared = str(FedParaConfig.__dataclass_fields__[name].type)
    if declared == "Overrides":
        return parse_overrides(value)
    if value is None and "None" in declared:
        return None
    if name == "variance":
        return _variance(value)
    if name == "clip":
        return parse_clip(value)
    return convert_value(name, declared.split(" ")[0].split("[")[0], value)


def _variance(value: Any) -> str | float:
    text = value.strip().lower() if isinstance(value, str) else value
    if text == "default":  # what "torch" was called before
        return "torch"
    try:
        return text if text in VARIANCE_RULES else to_float(text)
    except (TypeError, ValueError, OverflowError):
        shown = repr(value)[:80]
        raise ConfigError(f"option 'variance': expected {_VARIANCE_TEXT}, got {shown}") from None


def _in(limits: tuple[float, float], value: str | float) -> bool:
    return isinstance(value, str) or limits[0] <= value <= limits[1]


def _between(limits: tuple[float, float]) -> str:
    return f"a number from {limits[0]:g} to {limits[1]:g}"


_VARIANCE_TEXT = f"'torch', 'he', 'auto' or {_between(VARIANCES)}"
