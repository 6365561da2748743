"""SCAFFOLD and FedDyn against the published algorithms, written out with plain gradients."""

from __future__ import annotations

import pytest
import torch

from fedpara_plugins.optimizers import (
    ClientUpdate,
    CorrectionState,
    FedDynServer,
    LocalFedDyn,
    LocalScaffold,
    ScaffoldServer,
)

from .conftest import CLIENTS, LR, PARTICIPANTS

TOLERANCE = 2e-5
"""float32 on both sides, summed up in another order; a wrong sign or a wrong weight of one client
is off by 1e-2 and more."""

RATE = 0.7
ALPHA = 0.3


def _trained(model, private):
    return {n: p for n, p in model.named_parameters() if n not in private}


def _copy(state):
    return {name: value.detach().clone() for name, value in state.items()}


class Clients:
    """The model that all clients share here, and what each keeps in private."""

    def __init__(self, federation):
        self.federation = federation
        self.model = federation.build()
        self.first = _copy(self.model.state_dict())
        self.private = federation.private()
        self.kept = {}

    def load(self, x, client):
        own = self.kept.get(client, {k: self.first[k] for k in self.private})
        like = self.first
        state = {k: v.to(like[k].dtype) for k, v in x.items()}
        self.model.load_state_dict({**state, **own})
        self.model.train()

    def done(self, client):
        self.kept[client] = {k: self.model.state_dict()[k].clone() for k in self.private}
        return _copy(self.model.state_dict())


def gradient_at_x(federation, model, client, server_round):
    """Return the mean gradient of all batches; the buffers are as they were before."""
    parameters, buffers = dict(model.named_parameters()), _copy(dict(model.named_buffers()))
    passes = [
        torch.autograd.grad(federation.loss(model, batch), parameters.values())
        for batch in federation.batches(client, server_round)
    ]
    for k, b in model.named_buffers():
        b.copy_(buffers[k])
    mean = [sum(g) / len(passes) for g in zip(*passes, strict=True)]
    return dict(zip(parameters, mean, strict=True))


def published_scaffold(federation, option):
    """Algorithm 1 of arXiv 1910.06378, line by line, in float64 on the server."""
    clients = Clients(federation)
    model, loss = clients.model, federation.loss
    x = {k: v.double() for k, v in clients.first.items()}
    names = list(_trained(model, clients.private))
    c = {k: torch.zeros_like(x[k]) for k in names}
    c_i = [{k: torch.zeros_like(x[k]) for k in names} for _ in range(CLIENTS)]
    for server_round, chosen in enumerate(PARTICIPANTS, 1):
        after, change = [], []
        for i in chosen:
            clients.load(x, i)
            parameters = dict(model.named_parameters())
            start = _copy(_trained(model, clients.private))
            if option == "I":
                at_x = gradient_at_x(federation, model, i, server_round)
            steps = 0
            for batch in federation.batches(i, server_round):
                found = torch.autograd.grad(loss(model, batch), parameters.values())
                g = dict(zip(parameters, found, strict=True))
                with torch.no_grad():
                    for k, w in parameters.items():
                        w -= LR * ((g[k] - c_i[i][k] + c[k]) if k in names else g[k])
                steps += 1
            y = clients.done(i)
            if option == "I":
                new = {k: at_x[k].double() for k in names}
            else:
                new = {k: c_i[i][k] - c[k] + (start[k] - y[k]) / (steps * LR) for k in names}
            after.append(y)
            change.append({k: new[k] - c_i[i][k] for k in names})
            c_i[i] = new
        for k in x:
            if k in clients.private:
                continue
            mean = sum(y[k].double() for y in after) / len(chosen)
            x[k] = x[k] + RATE * (mean - x[k]) if k in names else mean
        for k in names:
            c[k] = c[k] + len(chosen) / CLIENTS * sum(d[k] for d in change) / len(chosen)
    return x, c, c_i


def published_feddyn(federation):
    """Algorithm 1 of arXiv 2111.04263; the argmin by the same steps of gradient descent."""
    clients = Clients(federation)
    model, loss = clients.model, federation.loss
    x = {k: v.double() for k, v in clients.first.items()}
    names = list(_trained(model, clients.private))
    h = {k: torch.zeros_like(x[k]) for k in names}
    dual = [{k: torch.zeros_like(x[k]) for k in names} for _ in range(CLIENTS)]
    for server_round, chosen in enumerate(PARTICIPANTS, 1):
        after = []
        for i in chosen:
            clients.load(x, i)
            parameters = dict(model.named_parameters())
            start = _copy(parameters)
            for batch in federation.batches(i, server_round):
                objective = loss(model, batch)
                for k in names:
                    objective = objective - (dual[i][k] * parameters[k]).sum()
                    objective = objective + ALPHA / 2 * (parameters[k] - start[k]).square().sum()
                g = torch.autograd.grad(objective, parameters.values())
                with torch.no_grad():
                    for w, step in zip(parameters.values(), g, strict=True):
                        w -= LR * step
            y = clients.done(i)
            for k in names:
                dual[i][k] = dual[i][k] - ALPHA * (y[k].double() - x[k])
            after.append(y)
        for k in names:
            h[k] = h[k] - ALPHA / CLIENTS * sum(y[k].double() - x[k] for y in after)
        for k in x:
            if k in clients.private:
                continue
            mean = sum(y[k].double() for y in after) / len(chosen)
            x[k] = mean - h[k] / ALPHA if k in names else mean
    return x, h, dual


def _train(federation, model, client, server_round):
    """A user's loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for batch in federation.batches(client, server_round):
        optimizer.zero_grad()
        federation.loss(model, batch).backward()
        optimizer.step()


def _kept(kept, server, client):
    kept.begin(server.sums.accepted(client))
    return kept.confirmed


def _assert_close(mine, theirs, names):
    for k in names:
        assert float((mine[k].double() - theirs[k].double()).abs().max()) <= TOLERANCE, k


@pytest.mark.parametrize("option", ["I", "II"])
def test_scaffold_is_the_published_algorithm(federation, option):
    clients = Clients(federation)
    model, x, server = clients.model, dict(clients.first), ScaffoldServer(rate=RATE)
    kept = [CorrectionState() for _ in range(CLIENTS)]
    for server_round, chosen in enumerate(PARTICIPANTS, 1):
        c = server.variate(CLIENTS, x) or None
        replies = []
        for i in chosen:
            clients.load(x, i)
            own = _kept(kept[i], server, i)
            local = LocalScaffold(
                model,
                own=own,
                server=c,
                option=option,
                losses=lambda i=i, r=server_round: (
                    (federation.loss(model, b), len(b[0])) for b in federation.batches(i, r)
                ),
            )
            since = kept[i].confirmed_round
            with local:
                _train(federation, model, i, server_round)
            result = local.result
            assert (result.steps, result.kept) == (5, 1.0)
            kept[i].end(result.own, server_round)
            names = frozenset(result.change)
            replies.append(ClientUpdate(clients.done(i), names))
            verdict = server.sums.take(
                result.change, node=i, client=str(i), since=since, server_round=server_round
            )
            assert verdict == ("taken" if since else "new")
        x = server.step(x, replies)
    theirs, c, c_i = published_scaffold(federation, option)
    shared = [k for k in theirs if k not in clients.private]
    _assert_close(x, theirs, shared)
    _assert_close(server.variate(CLIENTS, x), c, c)
    for mine, own in zip(kept, c_i, strict=True):
        _assert_close(mine.pending or mine.confirmed, own, own)


def test_feddyn_is_the_published_algorithm(federation):
    clients = Clients(federation)
    model, x, server = clients.model, dict(clients.first), FedDynServer(alpha=ALPHA)
    kept = [CorrectionState() for _ in range(CLIENTS)]
    for server_round, chosen in enumerate(PARTICIPANTS, 1):
        replies = []
        for i in chosen:
            clients.load(x, i)
            own = _kept(kept[i], server, i)
            with LocalFedDyn(model, own=own, alpha=ALPHA) as local:
                _train(federation, model, i, server_round)
            kept[i].end(local.result.own, server_round)
            reply = ClientUpdate(clients.done(i), frozenset(local.result.change))
            replies.append(reply)
            server.sums.take(
                server.change(x, reply),
                node=i,
                client=str(i),
                since=kept[i].confirmed_round,
                server_round=server_round,
            )
        x = server.step(x, replies, clients=CLIENTS)
    theirs, h, duals = published_feddyn(federation)
    _assert_close(x, theirs, [k for k in theirs if k not in clients.private])
    _assert_close(server.sums.mean(CLIENTS), h, h)
    for mine, own in zip(kept, duals, strict=True):
        _assert_close(mine.pending or mine.confirmed, own, own)
