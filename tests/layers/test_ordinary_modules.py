"""Converted models after a training step, in everything that torch lets one do with a module."""

import copy
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import cloudpickle
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

import fedpara_plugins as fedpara

METHODS = ("lowrank", "fedpara", "pfedpara")


def net():
    return nn.Sequential(
        nn.Conv2d(4, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=2),
        nn.Flatten(),
        nn.Linear(32 * 16, 48),
    )


def trained(method, base="factors"):
    torch.manual_seed(0)
    model = fedpara.convert(net(), method=method, gamma=0.3, min_size=0, base=base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(inputs()).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


def inputs():
    return torch.linspace(-1, 1, 3 * 4 * 16).reshape(3, 4, 4, 4)


@pytest.fixture(params=METHODS)
def model(request):
    return trained(request.param)


def test_cloudpickle(model):
    other = cloudpickle.loads(cloudpickle.dumps(model))
    torch.testing.assert_close(other(inputs()), model(inputs()))


def test_functional_call_uses_the_given_factors(model):
    state = {k: 0.5 * v if k == "5.x1" else v for k, v in model.state_dict().items()}
    got = functional_call(model, state, inputs())
    model.load_state_dict(state)
    torch.testing.assert_close(got, model(inputs()))


def test_stacked_clients_under_vmap(model):
    clients = [copy.deepcopy(model) for _ in range(3)]
    for i, client in enumerate(clients):
        client[5].x1.data.mul_(i + 1)
    parameters, buffers = stack_module_state(clients)

    def forward(p, b, x):
        return functional_call(model, (p, b), (x,))

    got = vmap(forward, in_dims=(0, 0, None))(parameters, buffers, inputs())
    expected = torch.stack([client(inputs()) for client in clients])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_per_sample_gradients(model):
    state = {k: v.detach() for k, v in model.named_parameters()}

    def loss(p, x):
        return functional_call(model, p, (x[None],)).square().sum()

    got = vmap(torch.func.grad(loss), in_dims=(None, 0))(state, inputs())
    model.zero_grad()
    model(inputs()[1:2]).square().sum().backward()
    torch.testing.assert_close(got["5.x1"][1], model[5].x1.grad, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing(model):
    x = inputs().requires_grad_()
    grads = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        model.zero_grad()
        forward(x).square().mean().backward()
        grads.append({k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_moves(model, dtype):
    expected = model(inputs())
    half = copy.deepcopy(model).to(dtype)
    assert half[5].weight.dtype == dtype
    gap = (half(inputs().to(dtype)).float() - expected).norm() / expected.norm()
    assert gap < 0.05


def test_autocast_composes_in_low_precision_and_trains(model):
    expected = model(inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(inputs())
    assert (output.float() - expected).norm() / expected.norm() < 0.05
    output.float().square().mean().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_export(model):
    program = torch.export.export(model.eval(), (inputs(),))
    torch.testing.assert_close(program.module()(inputs()), model(inputs()))


@pytest.mark.compiler
def test_compile(model):
    compiled = torch.compile(model, fullgraph=True)
    expected = model(inputs())
    torch.testing.assert_close(compiled(inputs()), expected, rtol=1e-4, atol=1e-5)
    compiled(inputs()).square().mean().backward()
    got = model[5].x1.grad.clone()
    model.zero_grad()
    model(inputs()).square().mean().backward()
    torch.testing.assert_close(got, model[5].x1.grad, rtol=1e-4, atol=1e-5)


def ddp_worker(port, method, base, folder, rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    rank = int(rank)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = nn.parallel.DistributedDataParallel(trained(method, base))
    model(inputs() * (rank + 1)).square().mean().backward()
    written = Path(folder) / f"{rank}.part"
    torch.save({k: p.grad for k, p in model.module.named_parameters()}, written)
    written.rename(written.with_suffix(".pt"))
    while not (Path(folder) / f"{1 - rank}.pt").exists():
        time.sleep(0.01)
    # gloo's threads end the process with an abort now and then, if the other side is gone first.
    os._exit(0)


@pytest.mark.parametrize(
    ("method", "base"),
    [("fedpara", "factors"), ("pfedpara", "factors"), ("lowrank", "frozen")],
)
def test_ddp_on_two_processes(method, base, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # This very file is the program of both processes, since they cannot import it by a name.
    command = [sys.executable, __file__, str(port), method, base, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)]) for rank in (0, 1)]
    assert [worker.wait(timeout=600) for worker in workers] == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model = trained(method, base)
    sum(0.5 * model(inputs() * k).square().mean() for k in (1, 2)).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("_base"):
            assert (one[name], two[name], parameter.grad) == (None, None, None)
            continue
        torch.testing.assert_close(one[name], two[name])
        torch.testing.assert_close(one[name], parameter.grad, rtol=1e-4, atol=1e-6)


if __name__ == "__main__":
    ddp_worker(*sys.argv[1:])
