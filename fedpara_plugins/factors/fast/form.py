"""The forms of weight that hand-written functions can compute.

All of this project's methods have W = s W1 or W = s W1 * (W2 + c), where c is 0 or 1, with or
without tanh around each operand. A method with another ``combine`` function has no form: torch's
own operations compose its weights, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from fedpara_plugins.factors.compose import combine_fedpara, combine_lowrank, combine_pfedpara

if TYPE_CHECKING:
    from fedpara_plugins.factors.methods import Method

__all__ = ["Form", "by_operand", "form_of", "is_known"]

T = TypeVar("T")


class Form(NamedTuple):
    """How operands make a weight.

    Attributes:
        operands: 1 or 2.
        plus_one: whether 1 is added to the second operand.
        gains: the multiplier of each operand; without tanh the first one carries s.
        tanh: whether each operand then passes through tanh.
        bound: the multiplier of the result; 1 without tanh.
    """

    operands: int
    plus_one: bool
    gains: tuple[float, ...]
    tanh: bool
    bound: float


_KNOWN: dict[Callable[..., object], tuple[int, bool]] = {
    combine_lowrank: (1, False),
    combine_fedpara: (2, False),
    combine_pfedpara: (2, True),
}
"""Number of operands and `Form.plus_one` by the combining function. The key is the function itself,
since another method of the same name may compute something else."""


def by_operand(factors: Sequence[T], operands: int) -> list[Sequence[T]]:
    """Group the factors x1, y1, x2, ... by operand: (x, y) of a matrix, (x, y, t) of a kernel."""
    size = len(factors) // operands
    return [factors[at : at + size] for at in range(0, len(factors), size)]


def is_known(method: Method) -> bool:
    """Return whether weights of this method have a form."""
    return _KNOWN.get(method.combine, (0, False))[0] == method.operands


def form_of(method: Method, gains: tuple[float, ...], *, tanh: bool, bound: float) -> Form | None:
    """Return the form of a method's weights; None if the method has none.

    Args:
        method: combines the operands.
        gains: the multiplier of each operand.
        tanh: whether each operand then passes through tanh.
        bound: the multiplier of the result.
    """
    if not is_known(method):
        return None
    operands, plus_one = _KNOWN[method.combine]
    return Form(operands, plus_one, gains, tanh, bound)
