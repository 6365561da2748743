"""FedML's optimizers as in their papers, in plain loops: gradients by hand, no hooks.

Neither the plugin nor FedML is used, and ``torch.optim`` only where a rule is defined by one of its
classes. The server computes in float64.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["ALGORITHMS", "PlainLoop"]

State = dict[str, Tensor]
Batches = Sequence[tuple[Tensor, Tensor]]


@dataclass
class LocalResult:
    """The result of a client's round."""

    state: State
    size: int
    steps: int = 0
    told: dict[str, Any] = field(default_factory=dict)


class PlainLoop:
    """Federated training over clients that may keep a part of the model to themselves.

    Subclasses are the algorithms; this one is FedAvg (arXiv 1602.05629).

    Args:
        model: converted or not; with the first weights.
        train: each client's batches, the same in every epoch and round.
        private: names that never leave a client, with the values that each of them begins with.
        lr: learning rate of the clients' SGD.
        epochs: a client's epochs in a round.
        smoothing: smoothing of the labels.
        private_steps: number of steps at the start of a round that train ``halves`` alone; later
            steps train everything else.
        halves: names of pFedPara's private half.
        absent: names that count as zero in the steps after those.
        keys: keys of the algorithm, under FedML's names.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Mapping[int, Batches],
        *,
        private: Mapping[str, Tensor] | None = None,
        lr: float = 0.1,
        epochs: int = 1,
        smoothing: float = 0.0,
        private_steps: int = 0,
        halves: Collection[str] = (),
        absent: Collection[str] = (),
        **keys: Any,
    ) -> None:
        self.model = copy.deepcopy(model)
        self.private_steps, self.halves = private_steps, frozenset(halves)
        self.absent = absent
        self.smoothing = smoothing
        self.train, self.lr, self.epochs, self.keys = train, lr, epochs, keys
        first = dict(private or {})
        self.like = {k: v.clone() for k, v in model.state_dict().items() if k not in first}
        self.x = {k: v.double() for k, v in self.like.items()}
        self.names = [n for n, p in model.named_parameters() if n not in first and p.requires_grad]
        self.own = {client: {k: v.clone() for k, v in first.items()} for client in train}
        self.clients = len(train)
        self.number = 0
        self.begin()

    # What algorithms fill in

    everywhere = False
    """Whether `direction` is for private parameters too."""

    def begin(self) -> None:
        """Make what the algorithm keeps."""

    def before(self, chosen: Sequence[int]) -> None:
        """Begin a round with these clients."""

    def direction(self, client: int, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        """Return the direction of a step for a shared parameter."""
        return gradient

    def server(self, replies: Mapping[int, LocalResult]) -> State:
        """Return the next x of all shared names."""
        return self.mean(replies)

    def batches(self, client: int) -> Batches:
        """Return a client's batches of one epoch of this round."""
        return self.train[client]

    # The loop

    def sample(self, number: int, a_round: int) -> list[int]:
        """Draw the clients of a round (the first is 0) as FedML does."""
        if a_round == self.clients:
            return list(range(a_round))
        np.random.seed(number)
        return [int(c) for c in np.random.choice(self.clients, a_round, replace=False)]

    def run(self, rounds: int, a_round: int) -> State:
        """Run all rounds, and return the shared state at the end in the model's dtypes."""
        for number in range(rounds):
            self.number = number
            chosen = self.sample(number, a_round)
            self.before(chosen)
            replies = {client: self.local(client) for client in chosen}
            # What the server sends is float32, so that is what it goes on from.
            self.x = {k: v.double() for k, v in self.sent(self.server(replies)).items()}
        return self.sent(self.x)

    def sent(self, x: State) -> State:
        """Cast each tensor to its initial dtype; integers are rounded."""
        return {
            k: (v if self.like[k].is_floating_point() else v.round()).to(self.like[k].dtype)
            for k, v in x.items()
        }

    def load(self, client: int) -> None:
        """Put x and the client's own part into the model."""
        self.model.load_state_dict({**self.sent(self.x), **self.own[client]})
        self.model.train()

    def local(self, client: int) -> LocalResult:
        """Train a client for one round; its private part stays with it."""
        self.load(client)
        self.start = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        weights = dict(self.model.named_parameters())
        steps, left = 0, self.private_steps
        self.first_step(client)
        for _ in range(self.epochs):
            for batch in self.batches(client):
                whole = left > 0 or not self.private_steps
                gradients = self.gradients(self.model, batch, whole=whole)
                self.batch(batch)
                with torch.no_grad():
                    for name, g in gradients.items():
                        weight = weights[name]
                        if self.private_steps and (name in self.halves) != (left > 0):
                            continue
                        if name in self.names or self.everywhere:
                            g = self.direction(client, name, weight, g)
                        weight.sub_(self.lr * g)
                steps, left = steps + (left <= 0), left - 1
        after = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.own[client] = {k: after[k] for k in self.own[client]}
        return LocalResult(after, self.size(client), steps)

    def first_step(self, client: int) -> None:
        """Prepare a client's first step."""

    def batch(self, batch: tuple[Tensor, Tensor]) -> None:
        """Prepare a client's step on this batch."""

    def size(self, client: int) -> int:
        """Return the number of a client's examples."""
        return sum(len(y) for _, y in self.train[client])

    def gradients(
        self, model: nn.Module, batch: tuple[Tensor, Tensor], *, whole: bool = True
    ) -> State:
        """Return gradients of a batch's mean loss, with absent names at zero unless ``whole``."""
        if not whole and self.absent:
            left_out = {k: v.clone() for k, v in model.state_dict().items() if k in self.absent}
            model.load_state_dict({k: 0 * v for k, v in left_out.items()}, strict=False)
            found = self.gradients(model, batch)
            model.load_state_dict(left_out, strict=False)
            return found
        inputs, labels = batch
        loss = nn.functional.cross_entropy(model(inputs), labels, label_smoothing=self.smoothing)
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))

    def mean(self, replies: Mapping[int, LocalResult], *, uniform: bool = False) -> State:
        """Average the clients' states, weighted by examples unless ``uniform``."""
        weights = {c: 1 if uniform else reply.size for c, reply in replies.items()}
        whole = sum(weights.values())
        return {
            k: sum(
                (weights[c] / whole * reply.state[k].double() for c, reply in replies.items()),
                torch.zeros_like(v),
            )
            for k, v in self.x.items()
        }

    def zeros(self) -> State:
        """Return float64 zeros of the trained shared parameters."""
        return {k: torch.zeros_like(self.x[k]) for k in self.names}

    # What came of it

    def accuracy(self, client: int, data: Batches) -> float:
        """Return the accuracy of the shared model, completed with a client's own part."""
        self.model.load_state_dict({**self.sent(self.x), **self.own[client]})
        self.model.eval()
        with torch.no_grad():
            right = sum(int((self.model(x).argmax(-1) == y).sum()) for x, y in data)
        return right / sum(len(y) for _, y in data)


class FedProx(PlainLoop):
    """arXiv 1812.06127: the clients' loss plus mu/2 |w - x|²."""

    def direction(self, client: int, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient + self.keys["fedprox_mu"] * (weight - self.start[name])


class FedOpt(PlainLoop):
    """arXiv 2003.00295 with a class of ``torch.optim`` on g = x - mean: FedML's own rule."""

    def begin(self) -> None:
        kind = {
            "sgd": torch.optim.SGD,
            "adam": torch.optim.Adam,
            "adagrad": torch.optim.Adagrad,
        }[self.keys["server_optimizer"]]
        self.weights = {k: nn.Parameter(self.x[k].clone()) for k in self.names}
        options = {"lr": self.keys["server_lr"]}
        if "server_momentum" in self.keys:
            options["momentum"] = self.keys["server_momentum"]
        if "eps" in self.keys:
            options["eps"] = self.keys["eps"]
        self.optimizer = kind(self.weights.values(), **options)

    def server(self, replies: Mapping[int, LocalResult]) -> State:
        mean = self.mean(replies)
        for k, weight in self.weights.items():
            weight.data = self.x[k].clone()
            weight.grad = self.x[k] - mean[k]
        self.optimizer.step()
        return {**mean, **{k: w.detach().clone() for k, w in self.weights.items()}}


class Adaptive(PlainLoop, ABC):
    """arXiv 2003.00295, algorithm 2: m and v of d = mean - x."""

    beta_1, beta_2 = 0.9, 0.99

    def begin(self) -> None:
        self.m, self.v, self.t = self.zeros(), self.zeros(), 0
        self.tau = self.keys["tau"]

    @abstractmethod
    def second(self, v: Tensor, square: Tensor) -> Tensor:
        """Return the next second moment."""

    def rate(self) -> float:
        rate: float = self.keys["server_lr"]
        return rate

    def server(self, replies: Mapping[int, LocalResult]) -> State:
        new = self.mean(replies)
        self.t += 1
        for k in self.names:
            d = new[k] - self.x[k]
            self.m[k] = self.beta_1 * self.m[k] + (1 - self.beta_1) * d
            self.v[k] = self.second(self.v[k], d * d)
            new[k] = self.x[k] + self.rate() * self.m[k] / (self.v[k].sqrt() + self.tau)
        return new


class PublishedYogi(Adaptive):
    """v from tau²."""

    def begin(self) -> None:
        super().begin()
        self.v = {k: torch.full_like(v, self.tau**2) for k, v in self.v.items()}

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v - (1 - self.beta_2) * square * torch.sign(v - square)


class CommonYogi(PublishedYogi):
    """Flower's: v from zero."""

    def begin(self) -> None:
        Adaptive.begin(self)


class CommonAdam(Adaptive):
    """Flower's: a bias correction that is one round ahead."""

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return self.beta_2 * v + (1 - self.beta_2) * square

    def rate(self) -> float:
        t = self.t + 1
        return super().rate() * math.sqrt(1 - self.beta_2**t) / (1 - self.beta_1**t)


class CommonAdagrad(Adaptive):
    """Flower's: no momentum."""

    beta_1 = 0.0

    def second(self, v: Tensor, square: Tensor) -> Tensor:
        return v + square


class Scaffold(PlainLoop):
    """arXiv 1910.06378, algorithm 1; clients count the same. Key ``option``: II, or I."""

    def begin(self) -> None:
        self.c = self.zeros()
        self.c_i = {client: self.zeros() for client in self.train}
        self.at_x: dict[int, State] = {}

    def first_step(self, client: int) -> None:
        if self.keys.get("option", "II") == "II":
            return
        self.at_x[client], size = self.zeros(), self.size(client)
        for batch in self.batches(client):
            part = self.gradients(self.model, batch, whole=not self.private_steps)
            for k in self.names:
                self.at_x[client][k] += len(batch[1]) / size * part[k].double()
        self.load(client)  # whose buffers the passes have moved

    def direction(self, client: int, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        return gradient + (self.c[name] - self.c_i[client][name]).float()

    def server(self, replies: Mapping[int, LocalResult]) -> State:
        new = self.mean(replies, uniform=True)
        for k in self.names:
            new[k] = self.x[k] + self.keys.get("server_lr", 1.0) * (new[k] - self.x[k])
        changes = {
            client: {
                k: -self.c[k] + (self.x[k] - reply.state[k].double()) / (reply.steps * self.lr)
                for k in self.names
            }
            for client, reply in replies.items()
        }
        if self.keys.get("option", "II") == "I":
            changes = {
                client: {k: self.at_x[client][k] - self.c_i[client][k] for k in self.names}
                for client in replies
            }
        for client, change in changes.items():
            for k in self.names:
                self.c_i[client][k] = self.c_i[client][k] + change[k]
                self.c[k] = self.c[k] + change[k] / self.clients
        return new


class FedDyn(PlainLoop):
    """arXiv 2111.04263, algorithm 1; the argmin by gradient descent."""

    def begin(self) -> None:
        self.h = self.zeros()
        self.dual = {client: self.zeros() for client in self.train}

    def direction(self, client: int, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        pull = self.keys["feddyn_alpha"] * (weight - self.start[name])
        return gradient - self.dual[client][name].float() + pull

    def server(self, replies: Mapping[int, LocalResult]) -> State:
        alpha = self.keys["feddyn_alpha"]
        new = self.mean(replies, uniform=True)
        for k in self.names:
            for client, reply in replies.items():
                step = alpha * (reply.state[k].double() - self.x[k])
                self.dual[client][k] = self.dual[client][k] - step
                self.h[k] = self.h[k] - step / self.clients
            new[k] = new[k] - self.h[k] / alpha
        return new


class FedNova(PlainLoop):
    """arXiv 2007.07481. With momentum rho the paper's a = [1 - rho^tau, ..., 1 - rho] / (1 - rho),
    with a proximal term a = [(1 - lr mu)^(tau - 1), ..., 1], written out as coefficients of the
    gradients; with both, the coefficients of the combined recursion, by brute force."""

    everywhere = True  # momentum and weight decay are; the proximal term is not

    def begin(self) -> None:
        self.buffer = self.zeros()

    def first_step(self, client: int) -> None:
        self.momentum: State = {}

    def direction(self, client: int, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        keys = self.keys
        gradient = gradient + keys.get("wd", 0.0) * weight
        if name in self.names:
            gradient = gradient + keys.get("mu", 0.0) * (weight - self.start[name])
        rho = keys.get("momentum", 0.0)
        if not rho:
            return gradient
        old = self.momentum.get(name)
        kept = (1 - keys.get("dampening", 0.0)) * gradient
        self.momentum[name] = gradient if old is None else rho * old + kept
        if keys.get("nesterov"):
            return gradient + rho * self.momentum[name]
        return self.momentum[name]

    def normaliser(self, steps: int) -> float:
        """Return |a|_1: the sum of the gradients' coefficients in the whole way."""
        keys = self.keys
        rho, mu = keys.get("momentum", 0.0), keys.get("mu", 0.0)
        if not mu and not keys.get("nesterov") and not keys.get("dampening"):
            return sum((1 - rho**j) / (1 - rho) if rho else 1.0 for j in range(1, steps + 1))
        if not rho:
            return sum((1 - self.lr * mu) ** j for j in range(steps))
        return sum(self.coefficient(j, steps) for j in range(steps))

    def coefficient(self, place: int, steps: int) -> float:
        """Return the coefficient of one step's gradient, in units of the rate."""
        keys = self.keys
        rho, mu = keys["momentum"], keys.get("mu", 0.0)
        way, held = 0.0, None
        for step in range(steps):
            gradient = (1.0 if step == place else 0.0) - mu * self.lr * way
            kept = (1 - keys.get("dampening", 0.0)) * gradient
            held = gradient if held is None else rho * held + kept
            way += gradient + rho * held if keys.get("nesterov") else held
        return way

    def server(self, replies: Mapping[int, LocalResult]) -> State:
        new = self.mean(replies)
        whole = sum(reply.size for reply in replies.values())
        p = {client: reply.size / whole for client, reply in replies.items()}
        a = {client: self.normaliser(reply.steps) for client, reply in replies.items()}
        counts = {c: r.steps if self.keys.get("mu") else a[c] for c, r in replies.items()}
        tau = sum(p[client] * counts[client] for client in replies)
        for k in self.names:
            step = sum(
                (p[c] / a[c] * (self.x[k] - r.state[k].double()) for c, r in replies.items()),
                torch.zeros_like(self.x[k]),
            )
            self.buffer[k] = self.keys.get("gmf", 0.0) * self.buffer[k] + tau * step
            new[k] = self.x[k] - self.buffer[k]
        return new


class Mime(PlainLoop):
    """arXiv 2008.03606, algorithm 1, and MimeLite; base SGD with momentum, or Adam.

    The first round of Adam, which has no statistics yet, steps as SGD."""

    def begin(self) -> None:
        self.beta = self.keys.get("server_momentum", 0.9)
        self.m, self.v, self.t = self.zeros(), self.zeros(), 0

    def before(self, chosen: Sequence[int]) -> None:
        whole = self.zeros()
        for client in chosen:
            self.load(client)
            size = self.size(client)
            for batch in self.batches(client):
                part = self.gradients(self.model, batch)
                for k in self.names:
                    whole[k] += len(batch[1]) / size / len(chosen) * part[k].double()
        self.c = whole

    def first_step(self, client: int) -> None:
        self.at_x = copy.deepcopy(self.model)

    def batch(self, batch: tuple[Tensor, Tensor]) -> None:
        self.x_gradients = self.gradients(self.at_x, batch)

    def direction(self, client: int, name: str, weight: Tensor, gradient: Tensor) -> Tensor:
        g = gradient
        if not self.keys.get("mimelite"):
            g = g - self.x_gradients[name] + self.c[name].float()
        if self.keys["server_optimizer"] == "adam" and not self.t:
            return g
        g = (1 - self.beta) * g + self.beta * self.m[name].float()
        if self.keys["server_optimizer"] == "adam":
            g = g / (self.v[name].float().sqrt() + self.keys.get("tau", 1e-3))
        return g

    def server(self, replies: Mapping[int, LocalResult]) -> State:
        self.t += 1
        for k in self.names:
            self.m[k] = (1 - self.beta) * self.c[k] + self.beta * self.m[k]
            self.v[k] = 0.01 * self.c[k] ** 2 + 0.99 * self.v[k]
        return self.mean(replies, uniform=True)


ALGORITHMS: Mapping[str, Callable[..., PlainLoop]] = {
    "FedAvg": PlainLoop,
    "FedProx": FedProx,
    "FedOpt": FedOpt,
    "published yogi": PublishedYogi,
    "flower adam": CommonAdam,
    "flower yogi": CommonYogi,
    "flower adagrad": CommonAdagrad,
    "SCAFFOLD": Scaffold,
    "FedDyn": FedDyn,
    "FedNova": FedNova,
    "Mime": Mime,
}
"""By FedML's name of the optimizer, or by whose rule it is."""
