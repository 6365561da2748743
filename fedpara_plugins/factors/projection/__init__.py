"""From the update of a dense weight to the update of its factors: one step of least squares.

For clients that train an ordinary dense model and send factors (option ``local``).
"""

from __future__ import annotations

from fedpara_plugins.factors.projection.least_squares import ITERATIONS, Solution, solve
from fedpara_plugins.factors.projection.tangent import Tangent
from fedpara_plugins.factors.projection.update import Projected, project, scale_for

__all__ = ["ITERATIONS", "Projected", "Solution", "Tangent", "project", "scale_for", "solve"]
