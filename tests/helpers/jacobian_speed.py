"""K by brute force: from the derivative of every entry of a weight by every shared entry."""

import torch

from fedpara_plugins.testing.brute_force import reference_weight


def jacobian_speed(layer, factors):
    """Return |J|² / entries, from explicit sums over the ranks."""
    plan = layer.plans["weight"]
    shared = [name for name in plan.factor_names if name not in plan.private_names]

    def weight(*values):
        return reference_weight(
            layer, "weight", {**factors, **dict(zip(shared, values, strict=True))}
        )

    parts = torch.autograd.functional.jacobian(weight, tuple(factors[name] for name in shared))
    return (
        float(sum(part.square().sum() for part in parts))
        / weight(*(factors[name] for name in shared)).numel()
    )
