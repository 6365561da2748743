"""SCAFFOLD and FedDyn without a framework: what an adapter needs on the client and the server.

    with LocalScaffold(model, own=c_i, server=c) as local:      # a client
        train(model)                                            # the user's own loop
    x = ScaffoldServer(rate=1.0).step(x, replies)               # the server

Variates and duals are named tensors of the shared, trained parameters. `Contributions` keeps their
sum correct when replies or clients' states are lost; `Guard` keeps them from growing on their own.
A public face of the core; it may import everything from ``codecs`` down.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedpara_plugins._moved import serve_old_names
from fedpara_plugins.optimizers.contributions import (
    ChangeOutcome,
    Contributions,
    CorrectionState,
)
from fedpara_plugins.optimizers.feddyn import FedDynServer, LocalFedDyn, check_alpha
from fedpara_plugins.optimizers.guard import Guard, NormHistory, share_kept
from fedpara_plugins.optimizers.guarded import GuardedRounds, log_outcome
from fedpara_plugins.optimizers.named_tensors import (
    State,
    copied,
    finite,
    norm,
    subtract,
    trained_parameters,
)
from fedpara_plugins.optimizers.rounds import (
    ClientUpdate,
    LocalResult,
    Weighting,
    client_weights,
    next_state,
)
from fedpara_plugins.optimizers.scaffold import LocalScaffold, ScaffoldServer, gradient_at
from fedpara_plugins.optimizers.step_observers import observe_steps
from fedpara_plugins.optimizers.steps import AddedGradient
from fedpara_plugins.optimizers.stored_state import StoredCorrectionState

__all__ = [
    "AddedGradient",
    "ChangeOutcome",
    "ClientUpdate",
    "Contributions",
    "CorrectionState",
    "FedDynServer",
    "Guard",
    "GuardedRounds",
    "LocalFedDyn",
    "LocalResult",
    "LocalScaffold",
    "NormHistory",
    "ScaffoldServer",
    "State",
    "StoredCorrectionState",
    "Weighting",
    "check_alpha",
    "client_weights",
    "copied",
    "finite",
    "gradient_at",
    "log_outcome",
    "next_state",
    "norm",
    "observe_steps",
    "share_kept",
    "subtract",
    "trained_parameters",
]

if not TYPE_CHECKING:
    __getattr__ = serve_old_names(
        __name__,
        {
            "Kept": "CorrectionState",
            "Norms": "NormHistory",
            "OwnState": "StoredCorrectionState",
            "Reply": "ClientUpdate",
            "Verdict": "ChangeOutcome",
            "difference": "subtract",
            "tell_verdict": "log_outcome",
            "watching": "observe_steps",
        },
    )
