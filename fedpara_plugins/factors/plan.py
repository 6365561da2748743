"""Everything about one factorised weight that its shape and the options decide.

A `WeightPlan` is computed once, when a model is converted; a training step only multiplies. Two
sides that convert the same model with the same options derive equal plans: no plan has to travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from fedpara_plugins.factors.compose import combine_lowrank, combine_sum, operand
from fedpara_plugins.factors.fast.conditions import as_autocast_casts, may_run
from fedpara_plugins.factors.fast.form import Form, by_operand, form_of, is_known
from fedpara_plugins.factors.fast.weight import Recipe, compose
from fedpara_plugins.factors.methods import Method
from fedpara_plugins.factors.ranks import is_kernel, parameter_count
from fedpara_plugins.factors.tanh import tanh_bound

__all__ = [
    "WeightPlan",
    "WeightSlot",
    "compose_together",
    "factor_key",
    "matrix_shape",
    "onto",
]

RECOMPUTE_BYTES = 4 << 20
"""Size of a weight (in float32) from which on backward computes the operands' products again, a
block of rows at a time. Held products would have left the cache by then, and would double a step's
memory."""


@dataclass(frozen=True)
class WeightSlot:
    """A weight of a dense layer that could be factorised.

    Attributes:
        name: the attribute of the layer, such as ``weight``.
        shape: (m, n) or (O, I, k1, ...).
        fan_in: inputs per output, for the target variance.
        variance: the variance that this kind of layer gives its weight by default.
        obstacle: why this weight cannot be composed (a clause for the report); "" if it can.
        he: whether the option ``variance="auto"`` may start it by He's rule, which is about weights
            whose outputs are sums over the fan-in.
    """

    name: str
    shape: tuple[int, ...]
    fan_in: int
    variance: float
    obstacle: str = ""
    he: bool = False


@dataclass(frozen=True)
class WeightPlan:
    """How one weight is factorised.

    Attributes:
        name: the attribute of the layer, such as ``weight``.
        shape: the dense weight's shape.
        method: combines the operands.
        rank: R of every operand.
        scale: fixed scalar s in W = s * combine(operands); never learned, never sent.
        factor_std: initial standard deviation of every shared factor's entries.
        private_std: the same for those private factors that do not start at zero.
        variance: target of the composed weight's initial variance.
        tanh: whether every operand passes through tanh (paper, section 3).
        recompute: whether backward computes the operands' products again instead of holding them;
            None lets the weight's size and form decide. The two sides of a run may differ in it.
        start: root mean square of the first composed weight in units of the square root of
            ``variance``, from 0 to 1; below 1 for a weight that starts small. It decides about
            initial factors alone, so the two sides of a run may differ in it.
        residual: whether the factors compose an update of a frozen weight W0, which is a parameter
            beside them (`base_key`), and not the weight itself. The update starts at zero.
        core: whether the operands of a kernel have a core; without one a kernel (O, I, k1, ...) is
            composed as a matrix (O, I k1 ...).
        one_sided: whether of the shared factors X of the first operand alone is trained (residual
            form). The others are seeded and fixed, so the update is linear in what is trained.
    """

    name: str
    shape: tuple[int, ...]
    method: Method
    rank: int
    scale: float
    factor_std: float
    private_std: float
    variance: float
    tanh: bool = False
    recompute: bool | None = field(default=None, compare=False)
    start: float = field(default=1.0, compare=False)
    residual: bool = False
    core: bool = True
    one_sided: bool = False

    def __post_init__(self) -> None:
        # Computed here: before Python 3.12 `cached_property` takes a lock, which torch.compile
        # refuses.
        _ = self.keys, self.adds_products

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Return the shape by which factors are made: ``shape``, or that of a matrix (m, n)."""
        return matrix_shape(self.shape, core=self.core)

    @property
    def kernel(self) -> bool:
        """Return whether the operands have a core."""
        return is_kernel(self.matrix_shape)

    @cached_property
    def factor_names(self) -> list[str]:
        """Return those of x1, y1, t1, x2, y2, t2, ... that this weight has, in this order."""
        return self.method.factor_names(kernel=self.kernel)

    @cached_property
    def keys(self) -> list[str]:
        """Return the names of the factors as the layer's parameters, ordered as `factor_names`."""
        return [factor_key(self.name, factor) for factor in self.factor_names]

    @property
    def private_names(self) -> list[str]:
        """Return those of `factor_names` that never leave the device."""
        return self.method.private_names(kernel=self.kernel)

    @property
    def base_key(self) -> str | None:
        """Return the name of W0 as the layer's parameter; None without a residual."""
        return f"{self.name}_base" if self.residual else None

    @property
    def fixed_names(self) -> list[str]:
        """Return those of `factor_names` that are seeded and never trained."""
        if not self.one_sided:
            return []
        trained = [f"x{self.method.first_shared + 1}", *self.private_names]
        return [name for name in self.factor_names if name not in trained]

    @property
    def parameters(self) -> int:
        """Return the number of entries of all factors, private ones included."""
        return parameter_count(self.matrix_shape, self.rank, operands=self.method.operands)

    @property
    def shared_parameters(self) -> int:
        """Return the number of entries of the factors that travel."""
        kept = {*self.private_names, *self.fixed_names}
        return sum(prod(self.factor_shape(n)) for n in self.factor_names if n not in kept)

    def factor_shape(self, factor: str) -> tuple[int, ...]:
        """Return a factor's shape by its name: x (m, R), y (n, R), t (R, R, k1, ...)."""
        if factor[0] == "t":
            return (self.rank, self.rank, *self.shape[2:])
        return (self.matrix_shape[0 if factor[0] == "x" else 1], self.rank)

    def zero_at_start(self, factor: str) -> bool:
        """Return whether this is a private factor that starts at zero, and its operand with it."""
        return factor in self.private_names and factor[0] == ("t" if self.kernel else "x")

    def compose(self, factors: Mapping[str, Tensor], base: Tensor | None = None) -> Tensor:
        """Compose W = s * combine(operands), of shape ``self.shape``, or W0 plus that.

        With tanh the scale goes inside: W = b combine(tanh(s' operand)), with s' such that b and
        the shared operands together carry s. With the scale outside, tanh would bound nothing.

        Args:
            factors: by name, with the shapes that `factor_shape` gives.
            base: W0 of the residual form; without it the result is the update alone.
        """
        rows, by_hand = self._composed(factors)
        if base is None:
            return self._shaped(rows)
        return self._by_hand_onto(base, rows) if by_hand else onto(base, self._shaped(rows))

    def _by_hand_onto(self, base: Tensor, rows: Tensor) -> Tensor:
        """Return W0 + update in the update's memory: the hand-written node has not kept it."""
        if may_run([rows, base]) and not base.requires_grad:
            return self._shaped(rows.add_(base.flatten(1)))
        return onto(base, self._shaped(rows))

    def _shaped(self, rows: Tensor) -> Tensor:
        # No view where none is needed, since a view is a node of autograd. For factors of other
        # shapes, `view` raises.
        # A proxy of torch.fx has a shape that cannot be compared.
        fits = isinstance(rows, Tensor) and rows.shape == self.shape
        return rows if fits else rows.view(self.shape)

    def compose_rows(self, factors: Mapping[str, Tensor]) -> Tensor:
        """Compose as `compose` does, from some rows of every x: rows are independent.

        Returns:
            These rows of W, shape (rows, n k1 ...).
        """
        return self._composed(factors)[0]

    def _composed(self, factors: Mapping[str, Tensor]) -> tuple[Tensor, bool]:
        """Compose rows, and return whether a hand-written function did."""
        ordered = self.ordered(factors)
        if not may_run(ordered) or self.form is None:
            return self.compose_plainly(ordered), False
        recipe = Recipe(self.form, self.compose_plainly, self.recomputes, len(ordered))
        return compose([recipe], as_autocast_casts(ordered))[0], True

    def ordered(self, factors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the factors in the order of `factor_names`."""
        return [factors[name] for name in self.factor_names]

    def compose_plainly(self, ordered: Sequence[Tensor]) -> Tensor:
        """Compose as `compose_rows` does, by torch's own operations.

        Args:
            ordered: the factors, as `ordered` returns them.
        """
        operands = []
        every = by_operand(ordered, self.method.operands)
        for gain, (x, *others) in zip(self.gains, every, strict=True):
            value = operand(x if gain == 1 else x * gain, *others)
            operands.append(torch.tanh(value) if self.tanh else value)
        value = self.method.combine(operands).flatten(1)
        return value if self.outer == 1 else value * self.outer

    @cached_property
    def adds_products(self) -> bool:
        """Return whether the weight is a plain sum of operands, each a product of factors."""
        return not self.tanh and self.method.combine in (combine_lowrank, combine_sum)

    @cached_property
    def form(self) -> Form | None:
        """Return the form for hand-written functions; None if they cannot compute this method."""
        return form_of(self.method, self.gains, tanh=self.tanh, bound=self.outer)

    @cached_property
    def recomputes(self) -> bool:
        """Return whether backward computes the products again instead of holding them.

        An update of a frozen weight by default does: whoever fine-tunes saves memory.
        """
        if self.recompute is not None:
            return self.recompute
        return self.residual or 4 * prod(self.shape) >= RECOMPUTE_BYTES

    @property
    def gains(self) -> tuple[float, ...]:
        """Return the multiplier of each operand, to apply to x, which has few entries."""
        count = self.method.operands
        if self.tanh:
            shared = count - len(self.method.private)
            inner = (self.scale / self.bound) ** (1 / shared)
            return tuple(1.0 if i in self.method.private else inner for i in range(count))
        return (self.scale, *[1.0] * (count - 1)) if is_known(self.method) else (1.0,) * count

    @property
    def outer(self) -> float:
        """Return the multiplier of the combined operands."""
        if self.tanh:
            return self.bound
        return 1.0 if is_known(self.method) else self.scale

    @property
    def bound(self) -> float:
        """Return b, the largest value that the shared operands can reach together under tanh.

        It is 1, as in the paper, unless a large variance (an embedding's, say) needs more.
        """
        return tanh_bound(self.variance)


def matrix_shape(shape: tuple[int, ...], *, core: bool) -> tuple[int, ...]:
    """Return the shape by which factors are made: the weight's, or (m, n k1 ...) without a core."""
    return shape if core else (shape[0], prod(shape[1:]))


def onto(base: Tensor, update: Tensor) -> Tensor:
    """Return W0 + update in the dtype of W0; an update of zero leaves every value as it is.

    Args:
        base: W0.
        update: of the same shape; factors of 16-bit weights are float32.
    """
    return (base + update).to(base.dtype)


def factor_key(weight: str, factor: str) -> str:
    """Return a factor's parameter name, with the weight's as a prefix unless that is ``weight``."""
    return factor if weight == "weight" else f"{weight}_{factor}"


def compose_together(
    plans: Sequence[WeightPlan],
    factors: Sequence[Mapping[str, Tensor]],
    bases: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Compose several weights as `WeightPlan.compose` does, in one node of autograd if possible.

    Args:
        plans: the weights' plans.
        factors: for each plan, its factors by name.
        bases: for each plan, W0 of the residual form, or None; None for none at all.
    """
    bases = [None] * len(plans) if bases is None else bases
    recipes = [
        Recipe(plan.form, plan.compose_plainly, plan.recomputes, len(plan.factor_names))
        for plan in plans
        if plan.form is not None
    ]
    flat = [f for plan, own in zip(plans, factors, strict=True) for f in plan.ordered(own)]
    if len(recipes) < len(plans) or not may_run(flat):
        every = zip(plans, factors, bases, strict=True)
        return [plan.compose(own, base) for plan, own, base in every]
    weights = compose(recipes, as_autocast_casts(flat))
    return [
        plan._shaped(rows) if base is None else plan._by_hand_onto(base, rows)
        for plan, rows, base in zip(plans, weights, bases, strict=True)
    ]
