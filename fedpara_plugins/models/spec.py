"""The description of a converted model that two sides must agree on.

A `ModelSpec` is taken from a converted model and fits into a payload's header as JSON. Without the
model's code it knows which names are private and where they stand in the state, their seeded
initial values, and how to turn a state of factors into the dense state.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.factors.fast.conditions import without_autocast
from fedpara_plugins.factors.initialise import initial_private
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers.base import FactorisedLayer, full_name
from fedpara_plugins.models.attached_config import config_of
from fedpara_plugins.models.head import head_tensors
from fedpara_plugins.models.private import PrivateTensor, private_tensors
from fedpara_plugins.models.private_start import first_values
from fedpara_plugins.models.spec_rows import (
    check_same_rows,
    compared_part,
    frozen_buffers,
    frozen_rows,
    merged_names,
    plan_from_row,
    row_of_plan,
)
from fedpara_plugins.models.wrapper_names import wrapper_hint
from fedpara_plugins.stages.stage import check_limit

__all__ = ["ModelSpec"]


@dataclass(frozen=True)
class ModelSpec:
    """The names of a model's state, its factorised weights, and its private tensors.

    Attributes:
        weights: plans by full name of the dense weight (``conv1.weight``), in the model's order.
        keys: all names of the model's state, in order.
        seed: the seed of the private tensors' initial values.
        own: private tensors that are no factors, by full name (options ``private``,
            ``private_head`` and ``label_prior``).
        frozen: hashes (`tensor_hash`) by full name of the tensors that a message leaves out because
            both sides hold them. They are what one message says, and no part of what a model is:
            two specs may be equal and differ here.
        buffers: those of ``frozen`` that are buffers: a client that changes one sends its value.
        held: first values of those in ``own`` that the model itself holds, by full name; not a part
            of the description. A spec that was read from a message has none.
    """

    weights: Mapping[str, WeightPlan]
    keys: tuple[str, ...]
    seed: int
    own: Mapping[str, PrivateTensor] = field(default_factory=dict)
    frozen: Mapping[str, str] = field(default_factory=dict, compare=False)
    buffers: frozenset[str] = field(default=frozenset(), compare=False)
    held: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> ModelSpec:
        """Return the spec of a model; that of an unconverted model has no weights.

        It keeps copies of the private tensors that are no factors: a client without private state
        starts from what its own model holds, so take the spec before the model is trained.
        """
        weights = {
            full_name(name, weight): plan
            for name, layer in model.named_modules()
            if isinstance(layer, FactorisedLayer)
            for weight, plan in layer.plans.items()
        }
        config = config_of(model)
        spec = cls(weights=weights, keys=tuple(model.state_dict()), seed=config.seed)
        private = private_tensors(model, config.private, factors=spec._factors)
        own = private | head_tensors(model)
        return replace(spec, own=own, held=first_values(model, private)) if own else spec

    # Names

    def factor_keys(self, weight: str) -> dict[str, str]:
        """Return the full names of one dense weight's factors in the state, by factor name."""
        path, _, attribute = weight.rpartition(".")
        names = self.weights[weight].factor_names
        return {n: full_name(path, FactorisedLayer.factor_key(attribute, n)) for n in names}

    @property
    def base_keys(self) -> dict[str, str]:
        """Full names of the frozen weights W0 in the state, by dense weight (residual form)."""
        return {
            weight: full_name(weight.rpartition(".")[0], plan.base_key)
            for weight, plan in self.weights.items()
            if plan.base_key is not None
        }

    @property
    def fixed_keys(self) -> frozenset[str]:
        """Full names of what is never trained: frozen weights W0, and fixed factors."""
        fixed = {
            self.factor_keys(weight)[name]
            for weight, plan in self.weights.items()
            for name in plan.fixed_names
        }
        return frozenset(fixed.union(self.base_keys.values()))

    @property
    def private_keys(self) -> frozenset[str]:
        """Full names of all tensors that never leave the device."""
        return self.private_factors | frozenset(self.own)

    @property
    def private_factors(self) -> frozenset[str]:
        """Full names of the private factors."""
        return frozenset(
            self.factor_keys(weight)[name]
            for weight, plan in self.weights.items()
            for name in plan.private_names
        )

    @property
    def private_bytes(self) -> int:
        """Bytes of all private tensors, with factors in float32."""
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
        """The names of the state that are sent, in order: neither private nor frozen."""
        private = self.private_keys
        return tuple(key for key in self.keys if key not in private and key not in self.frozen)

    # Values

    def initial_private(self, shared: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the initial values of all private tensors, by full name.

        Private factors are seeded. All others are what the model held (`held`); where that is not
        known, they are seeded too, or constants that suit their names.

        Args:
            shared: shared state whose dtypes the factors get; float32 without it, and beside
                frozen factors, which no message carries.

        Raises:
            PayloadError: the shared state lacks a factor.
        """
        values = {}
        for weight, plan in self.weights.items():
            keys = self.factor_keys(weight)
            first = initial_private(plan, seed=self.seed, key=weight)
            like = torch.float32
            if first and shared is not None and keys["x1"] not in self.frozen:
                like = _get(shared, keys["x1"]).dtype
            values.update({keys[name]: value.to(like) for name, value in first.items()})
        for key, own in self.own.items():
            values[key] = self._first_value(key, own)
        return values

    def _first_value(self, key: str, own: PrivateTensor) -> Tensor:
        if key in self.held:
            return self.held[key].clone()
        return own.initial_value(seed=self.seed, key=key)

    def dense_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the dense model's state, with the names and order of the unconverted model.

        Args:
            state: the converted model's state. Missing private factors count as zero, so the
                shared names alone give W1. Other missing private tensors get their initial values.

        Raises:
            PayloadError: a shared tensor is missing, or a private one does not fit the tensor that
                it is added to.
        """
        first_keys = {next(iter(self.factor_keys(w).values())): w for w in self.weights}
        factors = self._factors.union(self.base_keys.values())
        added = {key: own.onto for key, own in self.own.items() if own.onto}
        dense: dict[str, Tensor] = {}
        for key in self.keys:
            if key in first_keys:
                weight = first_keys[key]
                dense[weight] = self._composed(weight, state)
            elif key in added:
                continue
            elif key in self.own and key not in state:
                dense[key] = self._first_value(key, self.own[key])
            elif key not in factors:
                dense[key] = _get(state, key).detach().clone()
        for key, onto in added.items():
            if key in state:
                dense[onto] = _sum(dense, onto, state[key].detach(), key)
        return dense

    def dense_bytes(self, state: Mapping[str, Tensor]) -> int:
        """Return the bytes of the dense tensors that a part of the state represents.

        Args:
            state: any part of the converted model's state. A weight counts once, for its first
                factor; W0 of the residual form does not count beside it. Other tensors count
                themselves, but for those that are added to another.
        """
        weight_of = {
            key: (weight, name == plan.factor_names[0])
            for weight, plan in self.weights.items()
            for name, key in self.factor_keys(weight).items()
        }
        weight_of |= {key: (weight, False) for weight, key in self.base_keys.items()}
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
        base = _get(state, self.base_keys[weight]) if plan.residual else None
        with without_autocast(like.device.type):
            return plan.compose(factors, base).detach()

    # Agreement

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits, the same on two sides exactly when their models match."""
        content = [self.seed, list(self.keys), [compared_part(row) for row in self._rows()]]
        content += [self._own_rows()] if self.own else []
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def check_equal(self, other: ModelSpec, *, here: str, there: str) -> None:
        """Raise unless two specs are of the same model, converted in the same way.

        Args:
            other: the other side's spec.
            here: this side, in words.
            there: the other side, in words.

        Raises:
            MismatchError: the message names the first difference and both values.
        """
        if self.fingerprint == other.fingerprint:
            return
        check_same_rows(self._described(), other._described(), here=here, there=there)
        unlike = sorted(set(self.keys) ^ set(other.keys)) or "the order of the same names"
        raise MismatchError(
            f"the model's state differs between {here} ({len(self.keys)} names) and {there} "
            f"({len(other.keys)} names): {unlike}. Build the same model on both sides."
        )

    def check_described(self, data: Mapping[str, Any], *, here: str, there: str) -> None:
        """Raise unless ``data``, the other side's `to_json`, describes this model.

        The names of the other side's state need not be known, so a receiver can check before it
        decodes a tensor.

        Args:
            data: the other side's `to_json`.
            here: this side, in words.
            there: the other side, in words.

        Raises:
            MismatchError: the message names the first difference and both values.
            PayloadError: the data are malformed.
        """
        check_same_rows(self._described(), data, here=here, there=there)
        if data.get("fingerprint") != self.fingerprint:
            raise MismatchError(
                f"the names of the model's state differ between {here} (fingerprint "
                f"{self.fingerprint}, {len(self.keys)} names) and {there} (fingerprint "
                f"{str(data.get('fingerprint'))[:40]}); all factorised weights are alike. Build "
                f"the same model on both sides."
            )

    def shared_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the shared factors, by full name; a spec knows no others."""
        private = self.private_keys
        return {
            key: plan.factor_shape(name)
            for weight, plan in self.weights.items()
            for name, key in self.factor_keys(weight).items()
            if key not in private
        }

    def _rows(self) -> list[list[Any]]:
        return [row_of_plan(weight, plan) for weight, plan in self.weights.items()]

    def _own_rows(self) -> dict[str, list[Any]]:
        return {key: own.to_row() for key, own in self.own.items()}

    # As JSON

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a payload's header; the payload itself has the shared names."""
        private = self.private_keys
        places = [[i, key] for i, key in enumerate(self.keys) if key in private]
        described = {
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "weights": self._rows(),
            "private": places,
        }
        if self.own:
            described["own"] = self._own_rows()
        if self.frozen:
            described["frozen"] = [
                [i, key, self.frozen[key]] for i, key in enumerate(self.keys) if key in self.frozen
            ]
        if self.buffers:
            described["buffers"] = [i for i, key in enumerate(self.keys) if key in self.buffers]
        return described

    def _described(self) -> dict[str, Any]:
        """Return what `check_same_rows` compares."""
        return {"seed": self.seed, "weights": self._rows(), "own": self._own_rows()}

    @classmethod
    def from_json(
        cls, data: Mapping[str, Any], shared_keys: tuple[str, ...], *, limit: int | None = None
    ) -> ModelSpec:
        """Rebuild a spec from `to_json` and the names that the payload carries.

        Args:
            data: anything that claims to be a description.
            shared_keys: the shared names, in order.
            limit: most bytes that `initial_private` may take, since this side creates the private
                tensors and no payload bounds them; None for any number.

        Raises:
            PayloadError: the data are malformed, a method is not installed here, or the private
                tensors are larger than the limit.
        """
        try:
            frozen = frozen_rows(data.get("frozen", []))
            keys = merged_names(shared_keys, [*data["private"], *(row[:2] for row in frozen)])
            weights = {str(row[0]): plan_from_row(row) for row in data["weights"]}
            own = {
                str(key): PrivateTensor.from_row(row) for key, row in data.get("own", {}).items()
            }
            hashes = {key: digest for _, key, digest in frozen}
            buffers = frozen_buffers(data.get("buffers", []), frozen)
            if len(set(keys)) != len(keys):
                raise ValueError("a name is there twice")
            spec = cls(
                weights=weights,
                keys=keys,
                seed=int(data["seed"]),
                own=own,
                frozen=hashes,
                buffers=buffers,
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise PayloadError(f"the header's model description is malformed: {error!r}") from error
        if spec.fingerprint != data.get("fingerprint"):
            raise PayloadError(
                f"the header's model description does not match its own fingerprint "
                f"{data.get('fingerprint')!r}: it was changed, or the other side runs another "
                f"version of fedpara-plugins"
            )
        if limit is not None:
            drawn = max((own.drawn_bytes for own in spec.own.values()), default=0)
            check_limit(spec.private_bytes + drawn, limit, "the private tensors")
        return spec


def _sum(dense: Mapping[str, Tensor], onto: str, private: Tensor, key: str) -> Tensor:
    if onto not in dense or dense[onto].shape != private.shape:
        raise PayloadError(
            f"{key!r} of shape {tuple(private.shape)} is to be added to {onto!r}, but the "
            f"dense model has no such tensor of that shape"
        )
    return dense[onto] + private


def _get(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise PayloadError(
            f"the state lacks {key!r}: expected a state of the converted model."
            + wrapper_hint(state, [key])
        )
    return state[key]
