"""The journey that every whole model must survive."""

import copy
import io
import pickle

import pytest
import torch

import fedpara_plugins as fedpara


@pytest.fixture(params=["lowrank", "fedpara", "pfedpara"])
def method(request):
    return request.param


@pytest.fixture
def journey(method):
    """A function: convert, train, copy, go back to dense. Returns the converted model.

    Args of it: ``build`` gives a fresh dense model, ``output`` and ``loss`` call one; ``optimizer``
    makes one of the user's; within ``steps`` the loss must fall below ``fall`` times the first (not
    stay there: how an unclipped training goes on differs from processor to processor).
    """

    def run(build, output, loss, *, optimizer, steps=12, fall=0.8):
        torch.manual_seed(0)
        model = fedpara.convert(build(), method=method, gamma=0.2)
        names = list(build().state_dict())
        first, best = train(model, loss, optimizer(model.parameters()), steps)
        assert best < fall * first
        model.eval()
        with torch.no_grad():
            expected = output(model)
            for other in copies(model):
                torch.testing.assert_close(output(other), expected)
            dense = fedpara.to_dense(model)
            assert list(dense.state_dict()) == names
            assert {type(m) for m in dense.modules()} == {type(m) for m in build().modules()}
            plain = build().eval()
            plain.load_state_dict(dense.state_dict(), strict=True)
            for back in (dense, plain):
                torch.testing.assert_close(output(back), expected, rtol=1e-3, atol=1e-4)
            assert (output(build().eval()) - expected).abs().max() > 1e-2
        # A copy is no dead image: it trains on exactly as the original does.
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model]
        for twin in twins:
            train(twin.train(), loss, optimizer(twin.parameters()), 1)
        for twin in twins[:-1]:
            torch.testing.assert_close(twin.state_dict(), model.state_dict())
        return model

    return run


def train(model, loss, optimizer, steps):
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses[0], min(losses)


def copies(model):
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    yield torch.load(stream, weights_only=False)
    yield pickle.loads(pickle.dumps(model))
    yield copy.deepcopy(model)
