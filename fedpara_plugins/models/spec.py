"""What two sides must agree on about a converted model, and what one needs to rebuild the other.

A `ModelSpec` is taken from a converted model, fits into a payload's header as JSON, and knows
without the model's code: which keys are private and where they stand, their seeded first values,
and how to turn a state of factors into the dense state.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.factors.fast.conditions import without_autocast
from fedpara_plugins.factors.initialise import initial_private
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers.base import FactorisedLayer
from fedpara_plugins.models.attached_config import config_of
from fedpara_plugins.models.head import added_tensors
from fedpara_plugins.models.private import OwnTensor, own_tensors
from fedpara_plugins.plugins import methods
from fedpara_plugins.stages.stage import check_limit

__all__ = ["ModelSpec", "plan_from_row"]


@dataclass(frozen=True)
class ModelSpec:
    """The factorised weights of a model.

    Attributes:
        weights: plan by full name of the dense weight (``conv1.weight``), in the model's order.
        keys: all names of the model's state, in order.
        seed: of the private tensors' first values.
        own: by full name, further tensors that stay on the device (options ``private``,
            ``private_head`` and ``label_prior``).
    """

    weights: Mapping[str, WeightPlan]
    keys: tuple[str, ...]
    seed: int
    own: Mapping[str, OwnTensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module) -> ModelSpec:
        """The spec of a model as it stands; an unconverted model has no weights in it."""
        weights = {
            f"{name}.{weight}" if name else weight: plan
            for name, layer in model.named_modules()
            if isinstance(layer, FactorisedLayer)
            for weight, plan in layer.plans.items()
        }
        config = config_of(model)
        spec = cls(weights=weights, keys=tuple(model.state_dict()), seed=config.seed)
        own = own_tensors(model, config.private, factors=spec._factors) | added_tensors(model)
        return replace(spec, own=own) if own else spec

    # Names

    def factor_keys(self, weight: str) -> dict[str, str]:
        """Full names in the state by factor name, for one dense weight."""
        path, _, attribute = weight.rpartition(".")
        prefix = f"{path}." if path else ""
        names = self.weights[weight].factor_names
        return {name: prefix + FactorisedLayer.factor_key(attribute, name) for name in names}

    @property
    def private_keys(self) -> frozenset[str]:
        """Full names of everything that never leaves the device."""
        return self.private_factors | frozenset(self.own)

    @property
    def private_factors(self) -> frozenset[str]:
        """Those of `private_keys` that are factors."""
        return frozenset(
            self.factor_keys(weight)[name]
            for weight, plan in self.weights.items()
            for name in plan.private_names
        )

    @property
    def private_bytes(self) -> int:
        """Bytes of all private tensors, factors taken as float32."""
        factors = (
            4 * prod(plan.factor_shape(name))
            for plan in self.weights.values()
            for name in plan.private_names
        )
        return sum(factors) + sum(own.nbytes for own in self.own.values())

    @property
    def _factors(self) -> frozenset[str]:
        return frozenset(key for w in self.weights for key in self.factor_keys(w).values())

    @property
    def shared_keys(self) -> tuple[str, ...]:
        """All other names of the state, in order."""
        private = self.private_keys
        return tuple(key for key in self.keys if key not in private)

    # Values

    def initial_private(self, shared: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Seeded first values of all private tensors by full name.

        Args:
            shared: shared state, whose dtypes the factors get; float32 without it.
        """
        values = {}
        for weight, plan in self.weights.items():
            keys = self.factor_keys(weight)
            first = initial_private(plan, seed=self.seed, key=weight)
            like = torch.float32 if shared is None else _get(shared, keys["x1"]).dtype
            values.update({keys[name]: value.to(like) for name, value in first.items()})
        for key, own in self.own.items():
            values[key] = own.first(seed=self.seed, key=key)
        return values

    def dense_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The dense model's state, with the names and order of the unconverted model.

        Args:
            state: the converted model's state; missing private factors count as zero, so the
                shared keys alone give W1. Other private tensors that are missing get their first
                values.

        Raises:
            PayloadError: a shared factor is missing, or a private part does not fit its place.
        """
        first_keys = {next(iter(self.factor_keys(w).values())): w for w in self.weights}
        factors = self._factors
        added = {key: own.onto for key, own in self.own.items() if own.onto}
        dense: dict[str, Tensor] = {}
        for key in self.keys:
            if key in first_keys:
                weight = first_keys[key]
                dense[weight] = self._composed(weight, state)
            elif key in added:
                continue
            elif key in self.own and key not in state:
                dense[key] = self.own[key].first(seed=self.seed, key=key)
            elif key not in factors:
                dense[key] = _get(state, key).detach().clone()
        for key, onto in added.items():
            if key in state:
                dense[onto] = _sum(dense, onto, state[key].detach(), key)
        return dense

    def dense_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Bytes of the dense model's tensors that stand behind some tensors of the state.

        Args:
            state: any part of the converted model's state. A weight counts once, by its first
                factor; a name that is no factor counts as what it is, and what is only added to
                another tensor counts as nothing.
        """
        weight_of = {
            key: (weight, name == plan.factor_names[0])
            for weight, plan in self.weights.items()
            for name, key in self.factor_keys(weight).items()
        }
        total = 0
        for key, value in state.items():
            weight, first = weight_of.get(key, (None, True))
            if first and not (key in self.own and self.own[key].onto):
                entries = value.numel() if weight is None else prod(self.weights[weight].shape)
                total += entries * value.element_size()
        return total

    def _composed(self, weight: str, state: Mapping[str, Tensor]) -> Tensor:
        plan, keys = self.weights[weight], self.factor_keys(weight)
        like = _get(state, next(key for key in keys.values() if key not in self.private_keys))
        factors = {
            name: like.new_zeros(plan.factor_shape(name))
            if key in self.private_keys and key not in state
            else _get(state, key)
            for name, key in keys.items()
        }
        with without_autocast(like.device.type):
            return plan.compose(factors).detach()

    # Agreement

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that two sides share exactly when their models match."""
        content = [self.seed, list(self.keys), [list(row) for row in self._rows()]]
        content += [self._own_rows()] if self.own else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def check_equal(self, other: ModelSpec, *, here: str, there: str) -> None:
        """Raise unless the two are the same model, converted in the same way.

        Raises:
            MismatchError: names the first difference with both sides' values.
        """
        if self.fingerprint == other.fingerprint:
            return
        self._check_rows(other.to_json(), here=here, there=there)
        unlike = sorted(set(self.keys) ^ set(other.keys)) or "the order of the same names"
        raise MismatchError(
            f"the model's state differs between {here} ({len(self.keys)} names) and {there} "
            f"({len(other.keys)} names): {unlike}. Build the same model on both sides."
        )

    def check_described(self, data: Mapping[str, Any], *, here: str, there: str) -> None:
        """Raise unless ``data``, the other side's `to_json`, describes this very model.

        The names of the other side's state need not be known, so a receiver can ask before it
        decodes a tensor.

        Raises:
            MismatchError: names the first difference with both sides' values.
            PayloadError: malformed data.
        """
        self._check_rows(data, here=here, there=there)
        if data.get("fingerprint") != self.fingerprint:
            raise MismatchError(
                f"the names of the model's state differ between {here} (fingerprint "
                f"{self.fingerprint}, {len(self.keys)} names) and {there} (fingerprint "
                f"{str(data.get('fingerprint'))[:40]}); all factorised weights are alike. Build "
                f"the same model on both sides."
            )

    def _check_rows(self, data: Mapping[str, Any], *, here: str, there: str) -> None:
        """The part of a comparison that needs no names of the state."""
        try:
            mine = {weight: _row_text(row) for weight, *row in self._rows()}
            theirs = {str(weight): _row_text(row) for weight, *row in data["weights"]}
            seed, own = data["seed"], data.get("own", {})
            if not isinstance(own, Mapping) or not all(isinstance(key, str) for key in own):
                raise TypeError("'own' is no object with names as keys")
        except (ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise PayloadError(f"the header's model description is malformed: {error!r}") from error
        for weight in [*mine, *theirs]:
            if mine.get(weight) != theirs.get(weight):
                raise MismatchError(
                    f"the model differs at {weight[:200]!r}: {here} has "
                    f"{mine.get(weight, 'dense')}, {there} has {theirs.get(weight, 'dense')}. "
                    f"Build the same model with the same fedpara options (method; gamma, ratio or "
                    f"rank) on both sides."
                )
        if own != self._own_rows():
            apart = sorted(set(self.own) ^ set(own)) or sorted(self.own)
            raise MismatchError(
                f"the option private differs: {here} keeps {sorted(self.own)}, {there} keeps "
                f"{str(sorted(own))[:500]} (differing: {str(apart)[:500]}). Set the same fedpara "
                f"option private on both sides."
            )
        if seed != self.seed:
            raise MismatchError(
                f"the private factors start from another seed: {here} has seed {self.seed}, "
                f"{there} has seed {str(seed)[:40]}. Set the same fedpara option seed on both "
                f"sides."
            )

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the shared factors by full name; other tensors' shapes are not known."""
        private = self.private_keys
        return {
            key: plan.factor_shape(name)
            for weight, plan in self.weights.items()
            for name, key in self.factor_keys(weight).items()
            if key not in private
        }

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for weight, plan in self.weights.items():
            numbers = [plan.scale, plan.factor_std, plan.private_std, plan.variance]
            yield weight, plan.method.name, list(plan.shape), plan.rank, numbers, plan.tanh

    def _own_rows(self) -> dict[str, list[Any]]:
        return {key: own.to_row() for key, own in self.own.items()}

    # As JSON

    def to_json(self) -> dict[str, Any]:
        """Plain values for a payload's header. Names of ``keys`` are left to the payload itself."""
        private = self.private_keys
        described = {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "weights": [list(row) for row in self._rows()],
            "private": [[i, key] for i, key in enumerate(self.keys) if key in private],
        }
        return {**described, "own": self._own_rows()} if self.own else described

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], shared_keys: tuple[str, ...], *, limit: int | None = None
    ) -> ModelSpec:
        """Rebuild a spec from `to_json` and the names that the payload carried.

        Args:
            data: anything that claims to be a description.
            shared_keys: the names, in order.
            limit: bytes that the private tensors may have, which this side makes itself and which
                no payload bounds; None for any number.

        Raises:
            PayloadError: malformed data, a method that is not installed here, or larger private
                tensors than the limit allows.
        """
        try:
            keys = _merged(shared_keys, data["private"])
            weights = {str(row[0]): plan_from_row(row) for row in data["weights"]}
            own = {str(key): OwnTensor.from_row(row) for key, row in data.get("own", {}).items()}
            spec = cls(weights=weights, keys=keys, seed=int(data["seed"]), own=own)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise PayloadError(f"the header's model description is malformed: {error!r}") from error
        if spec.fingerprint != data.get("fingerprint"):
            raise PayloadError(
                f"the header's model description does not match its own fingerprint "
                f"{data.get('fingerprint')!r}: it was changed, or the other side runs another "
                f"version of fedpara-plugins"
            )
        if limit is not None:
            check_limit(spec.private_bytes, limit, "the private tensors")
        return spec


def _merged(shared: Sequence[str], private: Sequence[Sequence[Any]]) -> tuple[str, ...]:
    """All names in order, from the shared ones and the places of the private ones among all."""
    placed = {place: str(key) for place, key in private}
    count = len(shared) + len(private)
    # bool is an int to isinstance, not to the wire.
    if len(placed) != len(private) or not all(type(n) is int and 0 <= n < count for n in placed):
        raise ValueError("the places of the private names are not distinct places")
    rest = iter(shared)
    return tuple(placed[place] if place in placed else next(rest) for place in range(count))


def _row_text(row: list[Any]) -> str:
    """All that must be alike in a weight's row, its name left out, as people read it."""
    method, shape, rank, (scale, *std), tanh = row
    text = f"{str(method)[:40]} rank {str(rank)[:20]} shape {str(tuple(shape))[:60]} "
    text += f"scale {scale:.9g} first spread {', '.join(f'{number:.9g}' for number in std)}"
    return text + (" tanh" if tanh else "")


def plan_from_row(row: list[Any]) -> WeightPlan:
    """One of the ``weights`` of `ModelSpec.to_json`, its name in front.

    Raises:
        PayloadError: a method that is not installed here.
        ValueError, TypeError: not such a row.
    """
    weight, method, shape, rank, numbers, tanh = row
    scale, factor_std, private_std, variance = map(float, numbers)
    sizes = [*shape, rank]
    if not (len(shape) >= 2 and all(type(size) is int and 1 <= size < 2**40 for size in sizes)):
        raise ValueError(f"no weight can have shape {str(shape)[:60]} and rank {str(rank)[:20]}")
    if not all(map(math.isfinite, (scale, factor_std, private_std, variance))):
        raise ValueError(f"numbers that are not finite: {str(numbers)[:80]}")
    if method not in methods():
        raise PayloadError(
            f"{str(weight)[:200]!r}: the other side uses method {str(method)[:40]!r}, which is not "
            f"installed here (known: {', '.join(methods())}). Install the plugin that provides it."
        )
    return WeightPlan(
        name=str(weight).rpartition(".")[2],
        shape=tuple(shape),
        method=methods()[method],
        rank=rank,
        scale=scale,
        factor_std=factor_std,
        private_std=private_std,
        variance=variance,
        tanh=bool(tanh),
    )


def _sum(dense: Mapping[str, Tensor], onto: str, private: Tensor, key: str) -> Tensor:
    if onto not in dense or dense[onto].shape != private.shape:
        raise PayloadError(
            f"{key!r} of shape {tuple(private.shape)} is to be added to {onto!r}, which the dense "
            f"model has not in that shape"
        )
    return dense[onto] + private


def _get(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise PayloadError(f"the state lacks {key!r}: expected a state of the converted model")
    return state[key]
