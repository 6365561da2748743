"""The methods: how many operands a weight has, how they combine, and which of them stay private.

A method is data. Third parties register their own through ``fedpara_register_methods``. A method
that can be described as "operands, combined elementwise, some of them private" needs no other code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from fedpara_plugins.factors.compose import (
    combine_fedpara,
    combine_lowrank,
    combine_pfedpara,
    combine_sum,
)

__all__ = ["BUILTIN_METHODS", "FEDPARA", "LOWRANK", "PFEDPARA", "Method"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to write a weight as operands.

    Attributes:
        name: the value of the option ``method``.
        operands: number of inner weights X Yᵀ (or T x1 X x2 Y).
        private: indices of the operands that never leave the device. They start at zero, so a
            client without private state computes exactly the shared model.
        update: the same as ``combine`` for the residual form, where the result is added to a frozen
            weight. It must be zero where the first shared operand and the private ones are. None
            takes ``combine``.
        combine: maps the inner weights to the (unscaled) weight; all have the weight's shape. It
            must be elementwise, and of order ``operands - len(private)`` in the shared operands.
        speed: default of K, the composed weight's movement per step relative to a dense weight's.
        clip: share c of the option ``clip = "relative"``: a step moves a factor by at most c times
            its norm, as far as the gradient decides.
    """

    name: str
    operands: int
    combine: Callable[[Sequence[Tensor]], Tensor]
    speed: float
    private: frozenset[int] = frozenset()
    clip: float = 0.03
    update: Callable[[Sequence[Tensor]], Tensor] | None = None

    def as_update(self) -> Method:
        """Return the method by which the update of the residual form is combined."""
        return self if self.update is None else replace(self, combine=self.update, update=None)

    @property
    def first_shared(self) -> int:
        """Return the index of the first operand that is not private."""
        return next(i for i in range(self.operands) if i not in self.private)

    def factor_names(self, *, kernel: bool) -> list[str]:
        """Return the factors' names in order: x1, y1 (and t1 for a kernel), x2, y2, ..."""
        parts = ("x", "y", "t") if kernel else ("x", "y")
        return [f"{part}{i + 1}" for i in range(self.operands) for part in parts]

    def private_names(self, *, kernel: bool) -> list[str]:
        """Return those of `factor_names` that belong to private operands."""
        names = self.factor_names(kernel=kernel)
        return [name for name in names if int(name[1:]) - 1 in self.private]


LOWRANK = Method(name="lowrank", operands=1, combine=combine_lowrank, speed=1.0)
FEDPARA = Method(name="fedpara", operands=2, combine=combine_fedpara, speed=1.0)
PFEDPARA = Method(
    name="pfedpara",
    operands=2,
    combine=combine_pfedpara,
    speed=1.0,
    clip=0.1,
    private=frozenset({1}),
    # In a product with a shared operand of zero, the private one would have no gradient.
    update=combine_sum,
)

BUILTIN_METHODS = (LOWRANK, FEDPARA, PFEDPARA)
