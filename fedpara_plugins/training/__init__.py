"""Everything that acts on a user's training steps.

These are gradient clipping, weight decay, the decoupled schedule, label counts and the Jacobian
correction. The room may import ``layers`` and what stands below them. It offers adapters the start
of a round and a model's progress in it, and drift corrections a way to act on the gradients that a
step really uses. Its import registers the hooks that torch calls around each step of every
optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpara_plugins._moved import serve_old_names
from fedpara_plugins.training.jacobian import JacobianCorrection
from fedpara_plugins.training.label_counts import lacks_label_counts, set_label_counts
from fedpara_plugins.training.optimizer_check import check_optimizer
from fedpara_plugins.training.progress import RoundProgress
from fedpara_plugins.training.real_steps import Step, StepObserver, observe_real_steps
from fedpara_plugins.training.step_hooks import (
    round_progress,
    shared_phase,
    start_round,
)

__all__ = [
    "JacobianCorrection",
    "RoundProgress",
    "Step",
    "StepObserver",
    "check_optimizer",
    "lacks_label_counts",
    "observe_real_steps",
    "round_progress",
    "set_label_counts",
    "shared_phase",
    "start_round",
]

if not TYPE_CHECKING:
    # Models that an earlier release pickled refer to the class by this name.
    __getattr__ = serve_old_names(
        __name__, {"Training": "RoundProgress", "training_of": "round_progress"}
    )
