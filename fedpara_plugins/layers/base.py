"""The contract of every kind of factorised layer.

A kind is one class. It derives from `FactorisedLayer` and from the dense layer that it replaces,
lists the weights of the dense layer (`slots`) and declares each of them with `composed`. The rest
(conversion, names, initialisation, the way back to dense) is the same for all kinds and is here.
Kinds are registered through the hook ``fedpara_register_layers`` and tested with a subclass of
`fedpara_plugins.testing.LayerContract`.

A factorised layer adds parameters and no buffers, and its class is defined statically. It can
therefore be pickled, copied, stacked and compared like the dense layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.factors.fast.conditions import without_autocast
from fedpara_plugins.factors.fit import fit_weight
from fedpara_plugins.factors.initialise import (
    initial_factors,
    initial_private,
    seeded_shared,
)
from fedpara_plugins.factors.plan import WeightPlan, WeightSlot, compose_together, factor_key
from fedpara_plugins.layers.kept_weights import drop_kept_weights, has_kept_weights, kept_weight
from fedpara_plugins.layers.read_only import ReadOnlyWeight, read_only
from fedpara_plugins.support.torch_seams import (
    FX_LEAF,
    assembled_module,
    attributes_of,
    is_symbolically_tracing,
    own_parameters,
)
from fedpara_plugins.support.values import has_values, infinite, nonfinite

__all__ = ["FactorisedLayer", "Phase", "composed", "full_name", "layers_alive"]


ADDED_ATTRIBUTES = frozenset(
    {
        *("plans", "left_dense", "own_starts", "fit_errors", "fit_speeds", "origin", "infinite"),
        *("phase", "progress", "on_composed"),
        *FX_LEAF,
    }
)
"""Entries of a factorised layer's ``__dict__`` that the dense layer does not have."""

Phase = Literal["joint", "private", "shared"]
"""Which factors a training step moves: all, the private ones, or the shared ones."""


def full_name(*parts: str) -> str:
    """Return the dotted name of a layer's tensor in the model; empty parts are left out.

    A model that is a single layer has the name "", so its tensors keep their own names.
    """
    return ".".join(part for part in parts if part)


class composed:  # noqa: N801  (reads like `property` where it is used)
    """Descriptor of a weight: composed from factors, or the dense parameter without a plan."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: FactorisedLayer | None, owner: type | None = None) -> Any:
        if layer is None:
            return self
        value = layer.composed_weight(self.name)
        return read_only(value, self.name) if self.name in layer.plans else value


layers_alive: weakref.WeakSet[FactorisedLayer] = weakref.WeakSet()
"""All factorised layers of the process, for the hooks around optimizer steps."""


class FactorisedLayer(nn.Module):
    """Mixin of all factorised layers: the first base class, before the dense layer's class.

    In the residual form the dense weight W0 stays in the layer, as a parameter without gradients
    (``weight_base``), and the factors compose an update of it.
    """

    kind: ClassVar[str]
    """Short name of the kind, for reports."""

    dense_class: ClassVar[type[nn.Module]]
    """The class that this one replaces. It is matched exactly: subclasses keep their behaviour."""

    dense_reset: ClassVar[str] = "reset_parameters"
    """The dense class's method that draws its parameters."""

    may_skip_composing: ClassVar[bool] = False
    """Whether the forward does without the whole weight for some inputs."""

    plans: dict[str, WeightPlan]
    """The factorised weights, by attribute."""

    left_dense: dict[str, str]
    """Why other weights of the layer stay dense, by attribute; for the report."""

    on_composed: Callable[[str, Tensor], None] | None = None
    """Called with the name and value of every weight that is composed, to get its gradient."""

    progress: Any = None
    """The model's `fedpara_plugins.training.RoundProgress`; None before ``convert`` sets it."""

    phase: Phase = "joint"
    """Which factors the next training step moves; see `fedpara_plugins.training.step_hooks`."""

    origin: tuple[str, int]
    """The layer's name in the model and the config's seed, which seed the private factors."""

    fit_errors: Mapping[str, float] = {}
    """|W - composed| / |W| of each fitted weight when it was fitted, by attribute."""

    fit_speeds: Mapping[str, float] = {}
    """K of each fitted weight when it was fitted, by attribute."""

    own_starts: Mapping[str, float] = {}
    """Standard deviation of each fresh weight that kept the dense weight's, by attribute."""

    infinite: frozenset[str] = frozenset()
    """Parameters, no factors, that held infinities when the layer was converted: masks, say."""

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """Return the weights of ``dense`` that may be factorised."""
        raise TypeError(f"{cls.__name__} must define slots()")

    # From dense and back

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Return a dense layer, where code makes another layer of the kind that it has found.

        PEFT's LoRA for convolutions does so. Converted layers are assembled, without arguments.
        """
        return cls.dense_class(*args, **options) if args or options else super().__new__(cls)

    @classmethod
    def from_dense(
        cls,
        dense: nn.Module,
        plans: Mapping[str, WeightPlan],
        *,
        name: str,
        seed: int,
        fit: bool = False,
    ) -> FactorisedLayer:
        """Return a layer of this class in place of ``dense``, with fresh factors.

        It takes over every attribute, hook and remaining parameter of the dense layer, the very
        objects. In the order of parameters its factors replace the weight; in the residual form W0
        comes first and shares the dense weight's memory.

        Args:
            dense: instance of ``dense_class``; not modified.
            plans: the weights to factorise, by attribute; not empty.
            name: the layer's name in the model, which seeds its private factors.
            seed: see `fedpara_plugins.factors.initialise.initial_private`.
            fit: start from the closest factors to the dense weight instead of fresh ones. A
                weight that is too large for the speed of its plan gets another plan.
        """
        parameters: dict[str, nn.Parameter | None] = {}
        plans, errors, speeds = dict(plans), {}, {}
        for attribute, parameter in own_parameters(dense).items():
            plan = plans.get(attribute)
            if plan is None or parameter is None:
                parameters[attribute] = parameter
                continue
            key = full_name(name, attribute)
            if plan.base_key is not None:
                base = nn.Parameter(parameter.detach(), requires_grad=False)
                parameters[plan.base_key] = base
            factors = _first_factors(plan, seed=seed, key=key, meta=parameter.is_meta)
            if fit:
                fitted = fit_weight(plan, parameter, factors)
                plans[attribute] = fitted.plan
                # The first private factors follow from the plan, on every side.
                factors = fitted.factors | initial_private(fitted.plan, seed=seed, key=key)
                errors[attribute], speeds[attribute] = fitted.error, fitted.speed
            trained = parameter.requires_grad or plan.residual
            for factor, value in factors.items():
                value = value.to(parameter.device, _factor_dtype(plan, parameter))
                parameters[cls.factor_key(attribute, factor)] = nn.Parameter(
                    value, requires_grad=trained and factor not in plan.fixed_names
                )
        others = {k: p for k, p in parameters.items() if k in own_parameters(dense)}
        added = {
            "plans": plans,
            "left_dense": {},
            "fit_errors": errors,
            "fit_speeds": speeds,
            "infinite": frozenset(k for k, p in others.items() if _holds_infinity(p)),
            "origin": (name, seed),
            **FX_LEAF,
        }
        return assembled_module(cls, {**attributes_of(dense), **added}, parameters)

    def to_dense(self) -> nn.Module:
        """Return the dense layer with the composed weights.

        It takes over this layer's other parameters, the very objects, so tied parameters stay tied.
        `fedpara_plugins.to_dense` copies the model first.

        Raises:
            ConversionError: a parameter or composed weight holds NaN or infinity.
        """
        return self._dense_with(self._dense_parameters())

    def _dense_with(self, parameters: Mapping[str, nn.Parameter | None]) -> nn.Module:
        attributes = {k: v for k, v in attributes_of(self).items() if k not in ADDED_ATTRIBUTES}
        return assembled_module(self.dense_class, attributes, parameters)

    def _dense_parameters(self) -> dict[str, nn.Parameter | None]:
        parameters: dict[str, nn.Parameter | None] = {}
        owner = {key: weight for weight, plan in self.plans.items() for key in own_keys(plan)}
        for key, parameter in own_parameters(self).items():
            weight = owner.get(key)
            if weight is None:
                parameters[key] = _sound(parameter, may_be_infinite=key in self.infinite)
            elif weight not in parameters and parameter is not None:
                factors = self.factors(weight)
                # Both halves count, whatever phase of training the model is in.
                with without_autocast(parameter.device.type):
                    value = self.compose_from(weight, factors).detach()
                trained = any(factor.requires_grad for factor in factors.values())
                parameters[weight] = _sound(nn.Parameter(value, trained))
        return parameters

    # Execution

    def composed_weight(self, weight: str) -> Tensor:
        """Return W from its factors, differentiable; the dense parameter without a plan."""
        plan = self.plans.get(weight)
        if plan is None:
            return self._parameters[weight]  # type: ignore[return-value]
        # `on_composed` must see each weight once, and a kept weight was composed before.
        kept = None if self.on_composed is not None else kept_weight(self, weight)
        if kept is not None:
            return kept
        value = self.compose_from(weight, self.factors_now(weight))
        if self.on_composed is not None:
            self.on_composed(weight, value)
        return value

    def compose_from(self, weight: str, factors: Mapping[str, Tensor]) -> Tensor:
        """Compose W from these factors, onto W0 in the residual form.

        Args:
            weight: the attribute.
            factors: by name, as `factors_now` returns them.
        """
        return self.plans[weight].compose(factors, self.base(weight))

    def base(self, weight: str) -> Tensor | None:
        """Return W0 of a weight in the residual form; None for any other."""
        key = self.plans[weight].base_key
        if key is None:
            return None
        found = None if is_symbolically_tracing() else self._parameters.get(key)
        return getattr(self, key) if found is None else found

    def composed_weights(self) -> dict[str, Tensor]:
        """Return all composed weights by attribute, each as `composed_weight` returns it."""
        if has_kept_weights(self):
            return {weight: self.composed_weight(weight) for weight in self.plans}
        factors = [self.factors_now(weight) for weight in self.plans]
        bases = [self.base(weight) for weight in self.plans]
        values = compose_together([*self.plans.values()], factors, bases)
        composed = dict(zip(self.plans, values, strict=True))
        if self.on_composed is not None:
            for weight, value in composed.items():
                self.on_composed(weight, value)
        return composed

    def must_compose(self, weight: str) -> bool:
        """Return whether the composed weight itself is needed, or is kept already."""
        if weight not in self.plans or self.on_composed is not None:
            return True
        return has_kept_weights(self)

    def factors(self, weight: str) -> dict[str, Tensor]:
        """Return the parameters that are the factors of one weight, by name (x1, y1, ...)."""
        found, parameters, plan = {}, self._parameters, self.plans[weight]
        if is_symbolically_tracing():
            parameters = {}  # the tracer hands out proxies of parameters as attributes only
        for name, key in zip(plan.factor_names, plan.keys, strict=True):
            # `getattr` finds whatever replaced a parameter as well, but takes far longer.
            value = parameters.get(key)
            found[name] = getattr(self, key) if value is None else value
        return found

    def factors_now(self, weight: str) -> Mapping[str, Tensor]:
        """Return the factors to compose: as the present phase of training sees them."""
        plan, factors = self.plans[weight], self.factors(weight)
        if self.training and self.phase != "joint" and plan.private_names:
            return _of_phase(plan, factors, self.phase)
        return factors

    def private_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of this layer that only private steps train."""
        return [
            self.get_parameter(self.factor_key(weight, name))
            for weight, plan in self.plans.items()
            for name in plan.private_names
        ]

    factor_key = staticmethod(factor_key)

    def start_seeded(self) -> None:
        """Replace the shared factors by those that every side derives from the seed.

        Zeros stay zero, such as those of a padding row. See
        `fedpara_plugins.factors.initialise.seeded_shared`.
        """
        name, seed = self.origin
        for weight, plan in self.plans.items():
            values = seeded_shared(plan, seed=seed, key=full_name(name, weight))
            factors = self.factors(weight)
            with torch.no_grad():
                for key, value in values.items():
                    factor = factors[key]
                    drawn = value.to(factor.device, factor.dtype)
                    factor.copy_(torch.where(factor == 0, factor, drawn))

    # What torch expects of a layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the layer for optimizer steps, after a copy or unpickling too."""
        super().__setstate__({**state, **FX_LEAF})  # type: ignore[no-untyped-call]
        layers_alive.add(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `model.to(dtype)` and its kin write through `.data`, which changes no version.
        drop_kept_weights(self)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("plans", ()):
            if self._is_own_weight(name, value):
                return  # PEFT does so when it takes an adapter away
            raise ConversionError(
                f"{name} of this {self.kind} layer is composed from factors at each use and cannot "
                f"be assigned: assign before convert() and use init='fit', or set its factors"
            )
        super().__setattr__(name, value)

    def _is_own_weight(self, weight: str, value: Any) -> bool:
        if not isinstance(value, ReadOnlyWeight):
            return False
        with torch.no_grad():
            return torch.equal(value, self.composed_weight(weight))

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__.get("plans", ()):
            raise ConversionError(
                f"{name} of this {self.kind} layer is composed from factors at each use and cannot "
                f"be removed, as PEFT's adapters of attention do: go back with to_dense() first"
            )
        super().__delattr__(name)

    def reset_parameters(self) -> None:
        """Draw shared factors anew, private ones from the seed, biases as the dense layer does.

        W0 of the residual form is no first value, and stays.
        """
        self._reset_dense_parameters()
        name, seed = self.origin
        for weight, plan in self.plans.items():
            factors = _first_factors(plan, seed=seed, key=full_name(name, weight))
            with torch.no_grad():
                for factor, parameter in self.factors(weight).items():
                    parameter.copy_(factors[factor])

    def _reset_dense_parameters(self) -> None:
        """Apply the dense layer's rule, with a throw-away weight for each composed one."""
        rule = getattr(self.dense_class, self.dense_reset, None)
        if rule is None:
            return
        parameters = dict(own_parameters(self))
        for weight, plan in self.plans.items():
            own = [parameters.pop(key) for key in own_keys(plan)]
            assert own[0] is not None
            parameters[weight] = nn.Parameter(own[0].new_empty(plan.shape))
        rule(self._dense_with(parameters))

    def extra_repr(self) -> str:
        """Return the dense layer's text, then method and rank."""
        ranks = {
            w: f"frozen + {p.method.name} rank {p.rank}"
            if p.residual
            else f"{p.method.name} rank {p.rank}"
            for w, p in self.plans.items()
        }
        texts = [t if w == "weight" else f"{w}: {t}" for w, t in ranks.items()]
        return ", ".join(text for text in (super().extra_repr(), *texts) if text)


def _of_phase(
    plan: WeightPlan, factors: Mapping[str, Tensor], phase: Phase
) -> Mapping[str, Tensor]:
    """Return the shared half frozen for private steps, the private half zero for shared steps."""
    changed = dict(factors)
    for name, factor in factors.items():
        if phase == "private" and name not in plan.private_names:
            changed[name] = factor.detach()
        elif phase == "shared" and plan.zero_at_start(name):
            changed[name] = torch.zeros_like(factor)
    return changed


def own_keys(plan: WeightPlan) -> list[str]:
    """Return the names of a weight's parameters in its layer: W0, if it stays, and the factors."""
    return plan.keys if plan.base_key is None else [plan.base_key, *plan.keys]


def _first_factors(
    plan: WeightPlan, *, seed: int, key: str, meta: bool = False
) -> dict[str, Tensor]:
    """Draw a weight's first factors; on the meta device there are only shapes to draw."""
    if meta:
        return {n: torch.empty(plan.factor_shape(n), device="meta") for n in plan.factor_names}
    factors = initial_factors(plan, seed=seed, key=key)
    if plan.fixed_names:  # both sides must have them without a message
        factors |= seeded_shared(plan, seed=seed, key=key)
    return factors


def _factor_dtype(plan: WeightPlan, weight: Tensor) -> torch.dtype:
    """Return the dtype of factors: the weight's, but float32 for an update of a 16-bit weight.

    Steps of fine-tuning are smaller than what 16 bits resolve.
    """
    narrow = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if plan.residual and narrow else weight.dtype


def _holds_infinity(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and has_values(parameter) and bool(infinite(parameter).any())


def _sound(parameter: nn.Parameter | None, *, may_be_infinite: bool = False) -> nn.Parameter | None:
    """Return the parameter if its values are finite; infinities that it always had may stay."""
    if parameter is None or not has_values(parameter):
        return parameter
    bad = nonfinite(parameter)
    if may_be_infinite:
        bad &= ~infinite(parameter)
    if bad.any():
        raise ConversionError(
            "its factors or other parameters hold NaN or infinite values, or compose to such: the "
            "training has diverged. Go back to an earlier state, and see the option clip"
        )
    return parameter
