"""The contract that every kind of factorised layer fulfils.

A kind is one class, derived from `FactorisedLayer` and from the dense layer it replaces, that says
which weights the dense layer has (`slots`) and declares each of them with `composed`. Everything
else (conversion, names, initialisation, going back to dense) is the same for all kinds and lives
here. Registered through the hook ``fedpara_register_layers``, tested by inheriting
`fedpara_plugins.testing.LayerContract`.

Such a layer owns parameters only, no buffer, and its class exists statically: it can be pickled,
copied, stacked and compared like the layer it came from.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.factors.fast.conditions import without_autocast
from fedpara_plugins.factors.fit import fit_factors, relative_error
from fedpara_plugins.factors.initialise import initial_factors, seeded_shared
from fedpara_plugins.factors.plan import WeightPlan, WeightSlot, compose_together, factor_key
from fedpara_plugins.layers.kept_weights import forget, holds, kept_weight

__all__ = ["FactorisedLayer", "Phase", "composed", "layers_alive"]


OWN_ATTRIBUTES = frozenset(
    {"plans", "left_dense", "fit_errors", "origin", "phase", "progress", "on_composed"}
)
"""What a factorised layer has in its `__dict__` beyond the dense layer."""

Phase = Literal["joint", "private", "shared"]


class composed:  # noqa: N801  (reads like `property` where it is used)
    """Descriptor of a weight that is computed from factors; a dense weight if it has no plan."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: FactorisedLayer | None, owner: type | None = None) -> Any:
        return self if layer is None else layer.composed_weight(self.name)


layers_alive: weakref.WeakSet[FactorisedLayer] = weakref.WeakSet()
"""Every factorised layer, for the hooks around optimizer steps."""


class FactorisedLayer(nn.Module):
    """Mixin of all factorised layers; first base class, before the dense layer's class."""

    kind: ClassVar[str]
    """Short name of the kind, as shown in reports."""

    dense_class: ClassVar[type[nn.Module]]
    """The class this one replaces; matched exactly, so subclasses keep their own behaviour."""

    may_skip_composing: ClassVar[bool] = False
    """Whether its forward, for some inputs, does without the whole weight."""

    plans: dict[str, WeightPlan]
    """The factorised weights, by attribute name."""

    left_dense: dict[str, str]
    """Why other weights of the layer stay dense, by attribute name; for the report."""

    on_composed: Callable[[str, Tensor], None] | None = None
    """Called with every weight as it is composed; for those who need its gradient."""

    progress: Any = None
    """Where the model is in its round; see `fedpara_plugins.training.step_hooks`."""

    phase: Phase = "joint"
    """What training steps move now; see `fedpara_plugins.training.step_hooks`."""

    origin: tuple[str, int]
    """The layer's name in the model and the config's seed: what private factors are drawn from."""

    fit_errors: dict[str, float]
    """For weights that were fitted, |W - composed| / |W| at that time, by attribute name."""

    @classmethod
    def slots(cls, dense: nn.Module) -> list[WeightSlot]:
        """The weights of ``dense`` that may be factorised."""
        raise TypeError(f"{cls.__name__} must define slots()")

    # From dense and back

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
        """A layer of this class in place of ``dense``, with fresh factors.

        It takes over every attribute, hook and remaining parameter (the very objects) of the dense
        layer, and its factors stand where the weight stood in the order of parameters.

        Args:
            dense: instance of ``dense_class``; not modified.
            plans: what to factorise, by attribute name; not empty.
            name: the layer's name in the model, which seeds its private factors.
            seed: see `fedpara_plugins.factors.initialise.initial_private`.
            fit: start from the closest factors to the dense weight instead of fresh ones.
        """
        layer = cls.__new__(cls)
        layer.__dict__ = _own_attributes(dense)
        parameters: dict[str, nn.Parameter | None] = {}
        errors: dict[str, float] = {}
        for attribute, parameter in dense._parameters.items():
            plan = plans.get(attribute)
            if plan is None or parameter is None:
                parameters[attribute] = parameter
                continue
            key = f"{name}.{attribute}" if name else attribute
            factors = initial_factors(plan, seed=seed, key=key)
            if fit:
                factors = fit_factors(plan, parameter, factors)
                errors[attribute] = relative_error(plan, parameter, factors)
            for factor, value in factors.items():
                value = value.to(parameter.device, parameter.dtype)
                parameters[cls.factor_key(attribute, factor)] = nn.Parameter(
                    value, requires_grad=parameter.requires_grad
                )
        layer.__dict__["_parameters"] = parameters
        layer.__dict__["plans"] = dict(plans)
        layer.__dict__["left_dense"] = {}
        layer.__dict__["fit_errors"] = errors
        layer.__dict__["origin"] = (name, seed)
        return layer

    def to_dense(self) -> nn.Module:
        """The ordinary layer with the composed weights.

        It takes over this layer's other parameters, the very objects, so that what is tied stays
        tied; `fedpara_plugins.to_dense` copies the model first.
        """
        dense = self.dense_class.__new__(self.dense_class)
        own = _own_attributes(self)
        dense.__dict__ = {k: v for k, v in own.items() if k not in OWN_ATTRIBUTES}
        dense.__dict__["_parameters"] = self._dense_parameters()
        return dense

    def _dense_parameters(self) -> dict[str, nn.Parameter | None]:
        parameters: dict[str, nn.Parameter | None] = {}
        owner = {
            self.factor_key(weight, factor): weight
            for weight, plan in self.plans.items()
            for factor in plan.factor_names
        }
        for key, parameter in self._parameters.items():
            weight = owner.get(key)
            if weight is None:
                parameters[key] = _finite(parameter)
            elif weight not in parameters and parameter is not None:
                # Of both halves, whatever phase of training the model is in.
                with without_autocast(parameter.device.type):
                    value = self.plans[weight].compose(self.factors(weight)).detach()
                parameters[weight] = _finite(nn.Parameter(value, parameter.requires_grad))
        return parameters

    # Execution

    def composed_weight(self, weight: str) -> Tensor:
        """W from its factors, differentiable; the dense parameter if the weight has no plan."""
        plan = self.plans.get(weight)
        if plan is None:
            return self._parameters[weight]  # type: ignore[return-value]
        # Whoever is called with every weight must not be called twice for the same.
        kept = None if self.on_composed is not None else kept_weight(self, weight)
        if kept is not None:
            return kept
        value = plan.compose(self.factors_now(weight))
        if self.on_composed is not None:
            self.on_composed(weight, value)
        return value

    def composed_weights(self) -> dict[str, Tensor]:
        """All composed weights by name, as `composed_weight` gives them."""
        if holds(self):
            return {weight: self.composed_weight(weight) for weight in self.plans}
        factors = [self.factors_now(weight) for weight in self.plans]
        values = compose_together([*self.plans.values()], factors)
        composed = dict(zip(self.plans, values, strict=True))
        if self.on_composed is not None:
            for weight, value in composed.items():
                self.on_composed(weight, value)
        return composed

    def must_compose(self, weight: str) -> bool:
        """Whether somebody needs the composed weight itself, or has it already."""
        if weight not in self.plans or self.on_composed is not None:
            return True
        return holds(self)

    def factors(self, weight: str) -> dict[str, Tensor]:
        """The factors of one weight by their names (x1, y1, ...), as the parameters they are."""
        found, parameters, plan = {}, self._parameters, self.plans[weight]
        for name, key in zip(plan.factor_names, plan.keys, strict=True):
            # `getattr` finds them too, in Python and after all else, or what replaced them.
            value = parameters.get(key)
            found[name] = getattr(self, key) if value is None else value
        return found

    def factors_now(self, weight: str) -> Mapping[str, Tensor]:
        """The factors as the present phase of training sees them: what is to be composed."""
        plan, factors = self.plans[weight], self.factors(weight)
        if self.training and self.phase != "joint" and plan.private_names:
            return _of_phase(plan, factors, self.phase)
        return factors

    def private_parameters(self) -> list[nn.Parameter]:
        """What of this layer only private steps train."""
        return [
            self.get_parameter(self.factor_key(weight, name))
            for weight, plan in self.plans.items()
            for name in plan.private_names
        ]

    factor_key = staticmethod(factor_key)

    def start_seeded(self, *, name: str, seed: int) -> None:
        """Replace the shared factors by those that anyone derives from the seed.

        Zeros stay, such as a padding row's.

        Args:
            name: the layer's name in the model.
            seed: see `fedpara_plugins.factors.initialise.seeded_shared`.
        """
        for weight, plan in self.plans.items():
            values = seeded_shared(plan, seed=seed, key=f"{name}.{weight}" if name else weight)
            own = self.factors(weight)
            with torch.no_grad():
                for factor, value in values.items():
                    new = value.to(own[factor].device, own[factor].dtype)
                    own[factor].copy_(torch.where(own[factor] == 0, own[factor], new))

    # What torch expects of a layer

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called for every copy and every unpickled layer: optimizers must find these as well."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        layers_alive.add(self)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `model.to(dtype)` and the like write through `.data`, which nothing else would notice.
        forget(self)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("plans", ()):
            raise ConversionError(
                f"{name} of this {self.kind} layer is composed from factors at each use and cannot "
                f"be assigned: assign before convert() and use init='fit', or set its factors"
            )
        super().__setattr__(name, value)

    def reset_parameters(self) -> None:
        """Start again: new shared factors, seeded private ones, biases as in the dense layer."""
        self._reset_the_rest()
        name, seed = self.origin
        for weight, plan in self.plans.items():
            key = f"{name}.{weight}" if name else weight
            factors = initial_factors(plan, seed=seed, key=key)
            with torch.no_grad():
                for factor, parameter in self.factors(weight).items():
                    parameter.copy_(factors[factor])

    def _reset_the_rest(self) -> None:
        """The dense layer's own rule, on a layer that has a throw-away weight for each composed."""
        rule = getattr(self.dense_class, "reset_parameters", None)
        if rule is None:
            return
        dense = self.dense_class.__new__(self.dense_class)
        own = _own_attributes(self)
        dense.__dict__ = {k: v for k, v in own.items() if k not in OWN_ATTRIBUTES}
        parameters = dict(self._parameters)
        for weight, plan in self.plans.items():
            factors = [parameters.pop(self.factor_key(weight, f)) for f in plan.factor_names]
            assert factors[0] is not None
            parameters[weight] = nn.Parameter(factors[0].new_empty(plan.shape))
        dense.__dict__["_parameters"] = parameters
        rule(dense)

    def extra_repr(self) -> str:
        """The dense layer's own text, then method and rank."""
        ranks = {w: f"{p.method.name} rank {p.rank}" for w, p in self.plans.items()}
        texts = [t if w == "weight" else f"{w}: {t}" for w, t in ranks.items()]
        return ", ".join(text for text in (super().extra_repr(), *texts) if text)


def _own_attributes(layer: nn.Module) -> dict[str, Any]:
    attributes = layer.__dict__.copy()
    # What `layer.compile()` made runs the old layer; torch itself leaves it out of every copy.
    attributes.pop("_compiled_call_impl", None)
    return attributes


def _of_phase(
    plan: WeightPlan, factors: Mapping[str, Tensor], phase: Phase
) -> Mapping[str, Tensor]:
    """Private steps see the shared half frozen; shared steps see the private half switched off."""
    changed = dict(factors)
    for name, factor in factors.items():
        if phase == "private" and name not in plan.private_names:
            changed[name] = factor.detach()
        elif phase == "shared" and plan.zero_at_start(name):
            changed[name] = torch.zeros_like(factor)
    return changed


def _finite(parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is not None and not torch.isfinite(parameter).all():
        raise ConversionError(
            "its factors or other parameters hold NaN or infinite values, or compose to such: the "
            "training has diverged. Go back to an earlier state, and see the option clip"
        )
    return parameter
