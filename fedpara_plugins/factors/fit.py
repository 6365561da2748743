"""Factors that are closest to a weight that is already trained."""

from __future__ import annotations

from dataclasses import replace
from math import prod, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from fedpara_plugins.config import VARIANCES
from fedpara_plugins.factors.initialise import start_gains
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.factors.planning import stated_speed, with_variance
from fedpara_plugins.factors.speed import reached_speed, slowest_speed, with_stated_speed

__all__ = ["FittedWeight", "fit_factors", "fit_weight", "relative_error"]

STEPS = 200
"""Iterations of L-BFGS. On the layers of VGG16, more iterations gained less than 1 % of the
error."""

TOLERANCE = 1e-12
"""Smallest gradient and step of the descent. torch's defaults end it at the start of large weights,
whose loss is spread over many entries."""

LEAF_SIZE = 0.01
"""Root mean square that L-BFGS sees of the factors, whatever their own."""

FIRST_NOISE = 0.1
"""Size of the noise in the factors of the other shared operands. Without noise the descent would
not leave the low-rank start."""


LARGER = 2.0
"""Ratio between the variances that are tried for a weight which is larger than its plan's."""


class FittedWeight(NamedTuple):
    """The result of a fit.

    Attributes:
        plan: the plan given, for a larger variance if the weight needs one.
        factors: by name, float32.
        error: |W - composed| / |W|, see `relative_error`.
        speed: K that the factors reach.
    """

    plan: WeightPlan
    factors: dict[str, Tensor]
    error: float
    speed: float


def fit_weight(plan: WeightPlan, weight: Tensor, first: dict[str, Tensor]) -> FittedWeight:
    """Fit factors to a weight so that training moves it as fast as the plan states.

    Factors of a fitted weight are larger or smaller than fresh ones, and K with them. Sizes within
    an operand can raise K, and for a weight that is small against its plan they do
    (`fedpara_plugins.factors.speed.with_stated_speed`). A weight that is large against its plan
    gets the plan of a larger variance, which has a smaller scale; the other side of a run learns it
    from the model's description (`fedpara_plugins.models.adopt_plans`). A weight of zeros is
    composed of X = 0 and fresh other factors, as one starts LoRA, and trains.

    Args:
        plan: the weight's plan.
        weight: the target, shape ``plan.shape``.
        first: initial factors by name; the private ones are returned as they are.
    """
    target = weight.detach().float().cpu()
    if not target.any():
        plan, factors = replace(plan, start=0.0), dict(first)
        factors.update({name: first[name] * gain for name, gain in start_gains(plan).items()})
    else:
        plan, factors = _fit_with_speed(plan, target, first)
    factors = with_stated_speed(plan, factors)
    error = relative_error(plan, weight, factors)
    return FittedWeight(plan, factors, error, reached_speed(plan, factors))


def _fit_with_speed(
    plan: WeightPlan, target: Tensor, first: dict[str, Tensor]
) -> tuple[WeightPlan, dict[str, Tensor]]:
    """Fit with the smallest variance with which the factors are slow enough."""
    spread = float(target.double().square().mean().sqrt())
    while plan.variance < spread**2 and (larger := _larger(plan)):
        plan = larger
    # Without tanh all variances have the same fit, up to the sizes of its factors.
    unit = (target.double() * (sqrt(plan.variance) / spread)).float()
    fitted = fit_factors(plan, target if plan.tanh else unit, first)
    while True:
        factors = fitted if plan.tanh else _shrunk(plan, fitted, spread)
        slow = slowest_speed(plan, factors) <= stated_speed(plan)
        if slow or not (larger := _larger(plan)):
            return plan, factors
        ratio, plan = larger.factor_std / plan.factor_std, larger
        if plan.tanh:
            fitted = fit_factors(plan, target, first)
        else:
            private = plan.private_names
            fitted = {n: f if n in private else f * ratio for n, f in fitted.items()}


def _larger(plan: WeightPlan) -> WeightPlan | None:
    """Return the plan of the next larger variance; None if there is none."""
    variance = plan.variance * LARGER
    return with_variance(plan, variance) if variance <= VARIANCES[1] else None


def _shrunk(plan: WeightPlan, factors: dict[str, Tensor], spread: float) -> dict[str, Tensor]:
    """Shrink the first factor of a weight of the plan's variance to one of this spread."""
    name = next(name for name in plan.factor_names if name not in plan.private_names)
    return {**factors, name: factors[name] * (spread / sqrt(plan.variance))}


def fit_factors(plan: WeightPlan, weight: Tensor, first: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fit factors to a weight in the least-squares sense.

    The start is the best low-rank weight in the first shared operand (truncated SVD of the
    unfoldings), with the other shared operands close to one. L-BFGS descends from there, so the
    result is never worse than low rank at the same R. Private factors stay as they are: with their
    operand at zero, the shared part alone has to match.

    Args:
        plan: the weight's plan; its scale stays as derived from shape and options.
        weight: the target, shape ``plan.shape``.
        first: initial factors by name; the private ones are returned as they are.

    Returns:
        Factors by name, float32; without tanh all shared factors have equal root mean square.
    """
    # Gradients are recorded here, on the CPU, whatever mode the caller is in.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        target = weight.detach().double().cpu()
        spread = float(target.square().mean().sqrt())
        factors = {name: value.clone() for name, value in first.items()}
        shared = [i for i in range(plan.method.operands) if i not in plan.method.private]
        parts = ("x", "y", "t") if plan.kernel else ("x", "y")
        names = [f"{part}{i + 1}" for i in shared for part in parts]
        if plan.tanh:
            fitted = _fit(plan, target.float(), factors, shared)
            return {name: value.detach() for name, value in fitted.items()}
        # All weights are fitted alike: at root mean square 1 and scale 1, where operands are of
        # one size. Their factors are resized afterwards.
        fitted = _fit(replace(plan, scale=1.0), (target / (spread or 1.0)).float(), factors, shared)
    gain = (spread / plan.scale) ** (1 / len(names))
    fitted = {n: f.detach() * gain if n in names else f for n, f in fitted.items()}
    _balance(fitted, names)
    return fitted


def _fit(
    plan: WeightPlan, target: Tensor, factors: dict[str, Tensor], shared: list[int]
) -> dict[str, Tensor]:
    """Return factors after the descent from the low-rank start."""
    low = _low_rank(plan, target)
    gain = plan.scale ** (-1 / (len(shared) * len(low)))
    for i in shared:
        values = low if i == shared[0] else _near_one(plan)
        factors.update({f"{part}{i + 1}": value * gain for part, value in values.items()})
    _descend(plan, target, factors, [f"{part}{i + 1}" for i in shared for part in low])
    return factors


def relative_error(plan: WeightPlan, weight: Tensor, factors: dict[str, Tensor]) -> float:
    """Return |W - composed| / |W| in the Frobenius norm; for W = 0 return |composed|."""
    target = weight.detach().float().cpu()
    norm = float(target.norm())
    gap = float((plan.compose(factors) - target).norm())
    return gap / norm if norm else gap


def _low_rank(plan: WeightPlan, target: Tensor) -> dict[str, Tensor]:
    """Factorise a matrix by a truncated SVD, or a kernel by one of each unfolding (Tucker)."""
    rank = plan.rank
    rows = target.flatten(1)
    if not plan.kernel:
        u, s, vh = torch.linalg.svd(rows, full_matrices=False)
        root = s[:rank].sqrt()
        return {"x": _padded(u[:, :rank] * root, rank), "y": _padded(vh[:rank].T * root, rank)}
    x = torch.linalg.svd(rows, full_matrices=False)[0][:, :rank]
    columns = target.transpose(0, 1).flatten(1)
    y = torch.linalg.svd(columns, full_matrices=False)[0][:, :rank]
    core = torch.einsum("oi...,op,iq->pq...", target, x, y)
    size = max(core.norm().item(), 1e-12) ** (1 / 3)
    t = core.new_zeros(plan.factor_shape("t1"))
    t[: core.shape[0], : core.shape[1]] = core / size**2
    return {"x": _padded(x * size, rank), "y": _padded(y * size, rank), "t": t}


def _near_one(plan: WeightPlan) -> dict[str, Tensor]:
    """Return an operand of ones, made by its first components, with noise in the others."""
    rank, shape = plan.rank, plan.shape
    parts = {"x": (shape[0], rank), "y": (shape[1], rank)}
    values = {
        part: torch.randn(size, dtype=torch.float32) * FIRST_NOISE / sqrt(rank)
        for part, size in parts.items()
    }
    values["x"][:, 0] = values["y"][:, 0] = 1.0
    if plan.kernel:
        t = torch.randn(plan.factor_shape("t1"), dtype=torch.float32) * FIRST_NOISE / rank
        t[0, 0] = 1.0
        values["t"] = t
    return values


def _balance(factors: dict[str, Tensor], names: list[str]) -> None:
    """Give all shared factors the same root mean square, without changing their product."""
    sizes = [factors[name].square().mean().sqrt().item() for name in names]
    if min(sizes) <= 0:
        return
    common = prod(sizes) ** (1 / len(sizes))
    for name, size in zip(names, sizes, strict=True):
        factors[name] *= common / size


def _padded(factor: Tensor, rank: int) -> Tensor:
    missing = rank - factor.shape[1]
    return torch.nn.functional.pad(factor, (0, missing)) if missing else factor


def _descend(
    plan: WeightPlan, target: Tensor, factors: dict[str, Tensor], names: list[str]
) -> None:
    # L-BFGS takes its first step as if variables and gradients were of some size: without a common
    # one, fits to large weights end at the start.
    sizes = [float(factors[name].square().mean().sqrt()) for name in names]
    size = prod(sizes) ** (1 / len(sizes))
    unit = size / LEAF_SIZE if size > 0 else 1.0
    leaves = [(factors[name] / unit).contiguous().requires_grad_() for name in names]
    norm = max(target.square().sum().item(), 1e-30)
    optimizer = torch.optim.LBFGS(
        leaves,
        max_iter=STEPS,
        tolerance_grad=TOLERANCE,
        tolerance_change=TOLERANCE,
        history_size=10,
        line_search_fn="strong_wolfe",
    )

    def current() -> dict[str, Tensor]:
        return {**factors, **{n: leaf * unit for n, leaf in zip(names, leaves, strict=True)}}

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = (plan.compose(current()) - target).square().sum() / norm
        value.backward()  # type: ignore[no-untyped-call]
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]
    factors.update({name: value.detach() for name, value in current().items()})
