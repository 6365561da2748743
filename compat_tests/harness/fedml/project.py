"""A FedML project in one process: arguments, data set, model, and the outcome of a run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import fedml
import numpy as np
import torch
from fedml.arguments import Arguments
from torch import Tensor, nn

from fedpara_plugins import FedParaError
from harness.processes.kept_private import KeptPrivate, Traffic, kept_private

__all__ = [
    "DEFAULTS",
    "Outcome",
    "Sent",
    "arguments",
    "dataset",
    "forget_security",
    "model",
    "run",
    "traffic",
]

Batches = list[tuple[Tensor, Tensor]]

DEFAULTS: Mapping[str, Any] = {
    "training_type": "simulation",
    "backend": "sp",
    "random_seed": 0,
    "using_mlops": False,
    "enable_tracking": False,
    "enable_wandb": False,
    "dataset": "synthetic",
    "federated_optimizer": "FedAvg",
    "client_num_in_total": 4,
    "client_num_per_round": 2,
    "comm_round": 3,
    "epochs": 1,
    "batch_size": 10,
    "client_optimizer": "sgd",
    "learning_rate": 0.1,
    "weight_decay": 0.0,
    "frequency_of_the_test": 1,
    "using_gpu": False,
    "rank": 0,
    "run_id": "0",
}
UNCLIPPED: Mapping[str, Any] = {"fedpara_clip": "none"}
"""What a project with a method has unless it says otherwise: plain loops train without a clip."""

SIZES = (50, 30, 40, 20, 60)


def arguments(**keys: Any) -> Any:
    """Return what ``fedml.init`` would make of a YAML with these keys on top of `DEFAULTS`."""
    args = Arguments.__new__(Arguments)
    common = UNCLIPPED if "fedpara_method" in keys else {}
    for name, value in {**DEFAULTS, **common, **keys}.items():
        setattr(args, name, value)
    fedml.mlops.pre_setup(args)
    return args


def _initialise() -> None:
    """Initialise FedML once: it looks for settings in the home folder and gives up after seconds.

    It seeds torch too, so this must not come between a model's weights and its conversion.
    """
    args = Arguments.__new__(Arguments)
    for name, value in DEFAULTS.items():
        setattr(args, name, value)
    fedml.init(args, check_env=False, should_init_logs=False)


def dataset(clients: int = 4) -> list[Any]:
    """Return FedML's eight entries: each client's batches of 10, always in the same order."""
    rng = np.random.default_rng(5)
    centres = rng.normal(size=(4, 32))
    train, test = [], []
    for client in range(clients):
        train.append(_batches(rng, centres, SIZES[client], client))
        test.append(_batches(rng, centres, 20, client))
    everything = [[batch for own in part for batch in own] for part in (train, test)]
    sizes = {client: SIZES[client] for client in range(clients)}
    by_client = [dict(enumerate(part)) for part in (train, test)]
    return [sum(sizes.values()), 20 * clients, *everything, sizes, *by_client, 4]


def _batches(rng: np.random.Generator, centres: Any, size: int, client: int) -> Batches:
    """Draw a client's batches, with a mixture of classes and a shift of the inputs of its own."""
    weights = np.roll([0.55, 0.25, 0.1, 0.1], client)
    labels = rng.choice(4, size=size, p=weights)
    inputs = centres[labels] + rng.normal(size=(size, 32)) + 0.1 * client
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(labels)
    return [(x[at : at + 10], y[at : at + 10]) for at in range(0, size, 10)]


def model(seed: int = 3) -> nn.Module:
    """Build a smooth model: two layers to factorise, and one that is too small."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 4)
    )


@dataclass(frozen=True)
class Sent:
    """One message.

    Attributes:
        direction: ``up`` or ``down``.
        round: number of the server's round, 1 for the first.
        client: its name.
        data: all of its bytes.
    """

    direction: str
    round: int
    client: str
    data: bytes


@dataclass
class Outcome:
    """The outcome of a run.

    Attributes:
        runner: the FedMLRunner.
        state: the server's model at the end.
        sent: all messages, in order; none with FedML's own runner.
        kept_private: what clients kept private; `run` has searched all that left them for it.
    """

    runner: Any
    state: dict[str, Tensor]
    sent: list[Sent] = field(default_factory=list)
    kept_private: KeptPrivate = field(default_factory=KeptPrivate)

    @property
    def traffic(self) -> list[Traffic]:
        """All messages, for `KeptPrivate`."""
        return traffic(self.sent)

    def kept(self, client: int) -> dict[str, Tensor]:
        """Return a client's own model at the end: the server's shared part and its private one."""
        found: dict[str, Tensor] = self.runner.runner.clients._completed(str(client), self.state)
        return found


Tap = Callable[[Sent], bytes]
"""Sees every message, and returns what arrives of it."""


def run(
    *,
    net: nn.Module | None = None,
    data: list[Any] | Callable[[Any], list[Any]] | None = None,
    plain: bool = False,
    tap: Tap | None = None,
    **keys: Any,
) -> Outcome:
    """Run a project in this process, and assert that nothing private left a client.

    Args:
        net: the model; `model` by default.
        data: the data set, or what makes it for the arguments; `dataset` by default.
        plain: with FedML's own runner.
        tap: between server and clients.
        keys: keys of the YAML; ``client_trainer`` and ``server_aggregator`` are classes, called
            with the model and the arguments.
    """
    from fedpara_plugins_fedml import FedMLRunner

    own = {k: keys.pop(k) for k in ("client_trainer", "server_aggregator") if k in keys}
    args = arguments(**keys)
    net = net or model()
    data = data(args) if callable(data) else data
    given = {name: kind(net, args) for name, kind in own.items()}
    kind = fedml.FedMLRunner if plain else FedMLRunner
    runner = kind(args, torch.device("cpu"), data or dataset(), net, **given)
    inner = runner.runner
    if not hasattr(inner, "server"):
        runner.run()
        return Outcome(runner, copy.deepcopy(inner.fl_trainer.model_trainer.get_model_params()))
    sent = _watched(inner, tap or (lambda message: message.data))
    with kept_private() as kept:
        try:
            runner.run()
        finally:
            kept.check(traffic(sent))
    return Outcome(runner, {k: v.clone() for k, v in inner.server.state.items()}, sent, kept)


def traffic(sent: Iterable[Sent]) -> list[Traffic]:
    """Return messages for `KeptPrivate`."""
    from fedpara_plugins_fedml.messages.envelope import unpack

    found = []
    for each in sent:
        try:
            payloads = unpack(each.data).payloads
        except FedParaError:  # one that a test has damaged
            payloads = {}
        found.append(Traffic(each.direction, each.data, payloads))
    return found


def _watched(inner: Any, tap: Tap) -> list[Sent]:
    sent: list[Sent] = []
    message, train = inner.server.message, inner.clients.train

    def seen(direction: str, client: str, data: bytes) -> bytes:
        sent.append(Sent(direction, inner.server.round, client, data))
        return tap(sent[-1])

    inner.server.message = lambda client, *a: seen("down", client, message(client, *a))
    inner.clients.train = lambda client, *a: seen("up", client, train(client, *a))
    return sent


def forget_security() -> None:
    """Reset FedML's attacks, defences and differential privacy, which are global singletons."""
    from fedml.core.dp.fedml_differential_privacy import FedMLDifferentialPrivacy
    from fedml.core.security.fedml_attacker import FedMLAttacker
    from fedml.core.security.fedml_defender import FedMLDefender

    FedMLDifferentialPrivacy._dp_instance = None
    FedMLAttacker._attacker_instance = None
    FedMLDefender._defender_instance = None


_initialise()
