"""The update of factors from the update of a dense weight: one step of least squares.

It serves clients that train an ordinary dense model and send factors (option ``local``). May import
the modules of ``factors``. Offers `project`, its parts `Tangent` and `solve`, and their results.
"""

from __future__ import annotations

from fedpara_plugins.factors.projection.least_squares import ITERATIONS, Solution, solve
from fedpara_plugins.factors.projection.tangent import Tangent
from fedpara_plugins.factors.projection.update import Projected, project, scale_for

__all__ = ["ITERATIONS", "Projected", "Solution", "Tangent", "project", "scale_for", "solve"]
