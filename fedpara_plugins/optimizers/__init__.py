"""SCAFFOLD and FedDyn without a framework: what an adapter needs on either side.

    with LocalScaffold(model, own=c_i, server=c) as local:      # a client
        train(model)                                            # the user's own loop
    x = ScaffoldServer(rate=1.0).step(x, replies)               # the server

Variates and duals are named tensors of the shared, trained parameters. `Contributions` keeps their
sum right when replies or clients' states are lost; `Guard` keeps them from growing on their own.
"""

from __future__ import annotations

from fedpara_plugins.optimizers.contributions import Contributions, Kept, Verdict
from fedpara_plugins.optimizers.feddyn import FedDynServer, LocalFedDyn, check_alpha
from fedpara_plugins.optimizers.guard import Guard, Norms, share_kept
from fedpara_plugins.optimizers.guarded import GuardedRounds, tell_verdict
from fedpara_plugins.optimizers.kept_storage import OwnState
from fedpara_plugins.optimizers.named import (
    State,
    copied,
    difference,
    finite,
    norm,
    trained_parameters,
)
from fedpara_plugins.optimizers.rounds import (
    LocalResult,
    Reply,
    Weighting,
    client_weights,
    next_state,
)
from fedpara_plugins.optimizers.scaffold import LocalScaffold, ScaffoldServer, gradient_at
from fedpara_plugins.optimizers.steps import AddedGradient
from fedpara_plugins.optimizers.watch import watching

__all__ = [
    "AddedGradient",
    "Contributions",
    "FedDynServer",
    "Guard",
    "GuardedRounds",
    "Kept",
    "LocalFedDyn",
    "LocalResult",
    "LocalScaffold",
    "Norms",
    "OwnState",
    "Reply",
    "ScaffoldServer",
    "State",
    "Verdict",
    "Weighting",
    "check_alpha",
    "client_weights",
    "copied",
    "difference",
    "finite",
    "gradient_at",
    "next_state",
    "norm",
    "share_kept",
    "tell_verdict",
    "trained_parameters",
    "watching",
]
