"""The paper's Jacobian correction, a term that a user may add to the loss (section 3, Eq. 9)."""

from __future__ import annotations

from functools import partial
from types import TracebackType

import torch
from torch import Tensor, nn

from fedpara_plugins.errors import ConversionError
from fedpara_plugins.layers.base import FactorisedLayer

__all__ = ["JacobianCorrection"]


class JacobianCorrection:
    r"""A penalty that draws a step on the factors towards the step of the dense weight.

    Let J_W be the gradient of the loss with respect to a composed weight W, and W' the weight
    composed from the factors after one SGD step of size ``lr``. Then

    .. math:: R = \frac{\lambda}{2} \sum_{layers} \lVert W' - (W - lr J_W) \rVert^2

    J_W is a constant in R; the paper leaves that open. Like the paper, R ignores momentum and
    weight decay.

    Args:
        model: a converted model.
        lr: size of the virtual step, the user's learning rate.
        weight: lambda. The paper trained with 1, and showed 10 in an ablation whose effect is
            within noise. Each use costs one more backward pass through the model.

    Raises:
        ConversionError: the model has no factorised layer.

    Example:
        >>> model = convert(nn.Linear(64, 64), method="fedpara")
        >>> correction = JacobianCorrection(model, lr=0.1, weight=1.0)
        >>> with correction:                    # records the weights that the forward composes
        ...     loss = model(torch.ones(2, 64)).square().mean()
        >>> (loss + correction(loss)).backward()
    """

    def __init__(self, model: nn.Module, *, lr: float, weight: float = 1.0) -> None:
        self._layers = [layer for layer in model.modules() if isinstance(layer, FactorisedLayer)]
        if not self._layers:
            raise ConversionError(
                "JacobianCorrection: the model has no factorised layer; convert() it first"
            )
        self._lr, self._weight = lr, weight
        self._composed: dict[tuple[int, str], list[Tensor]] = {}

    def __enter__(self) -> JacobianCorrection:
        self._composed = {}
        for index, layer in enumerate(self._layers):
            layer.__dict__["on_composed"] = partial(self._record, index)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for layer in self._layers:
            del layer.__dict__["on_composed"]

    def __call__(self, loss: Tensor) -> Tensor:
        """Return the term to add to ``loss``, a scalar computed inside the ``with`` block."""
        weights = [weight for uses in self._composed.values() for weight in uses]
        gradients = iter(torch.autograd.grad(loss, weights, retain_graph=True))
        total = loss.new_zeros(())
        for (index, name), uses in self._composed.items():
            # A layer that is called twice composes twice: its weight's gradient is the sum.
            jacobian = sum((next(gradients) for _ in uses), torch.zeros_like(uses[0])).detach()
            total = total + self._term(self._layers[index], name, jacobian)
        return 0.5 * self._weight * total

    def _term(self, layer: FactorisedLayer, name: str, jacobian: Tensor) -> Tensor:
        plan, factors = layer.plans[name], layer.factors(name)
        trained = {n: f for n, f in factors.items() if n not in plan.fixed_names}
        weight = plan.compose(factors)  # in the residual form the update, which differs by W0
        pulled = (weight * jacobian).sum()
        steps = torch.autograd.grad(pulled, list(trained.values()), create_graph=True)
        moved = factors | {
            factor: value - self._lr * step
            for (factor, value), step in zip(trained.items(), steps, strict=True)
        }
        gap = plan.compose(moved) - (weight - self._lr * jacobian)
        return gap.square().sum()

    def _record(self, index: int, name: str, weight: Tensor) -> None:
        self._composed.setdefault((index, name), []).append(weight)
