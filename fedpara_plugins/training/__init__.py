"""What acts on a user's training steps: clip, decay, schedule, label counts, the Jacobian term.

May import ``layers`` and what stands below it. Importing it registers the hook that torch calls
before every optimizer's step.
"""

from __future__ import annotations

from fedpara_plugins.training.jacobian import JacobianCorrection
from fedpara_plugins.training.label_counts import lacks_label_counts, set_label_counts
from fedpara_plugins.training.optimizer_check import check_optimizer
from fedpara_plugins.training.step_hooks import Training, shared_phase, start_round, training_of

__all__ = [
    "JacobianCorrection",
    "Training",
    "check_optimizer",
    "lacks_label_counts",
    "set_label_counts",
    "shared_phase",
    "start_round",
    "training_of",
]
