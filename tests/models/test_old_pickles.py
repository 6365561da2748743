"""Models that an earlier release pickled: they load, compose the same weights, and train.

``golden/pickled_before_rooms.pkl`` was written by the tree before its modules moved (commit
5384242): for each method a model of every kind of layer, and its dense state.
"""

import copy
import pickle
import warnings
from pathlib import Path

import pytest
import torch

import fedpara_plugins as fedpara
from fedpara_plugins.layers import FactorisedLayer
from fedpara_plugins.training import RoundProgress, round_progress, start_round

GOLDEN = Path(__file__).parent / "golden" / "pickled_before_rooms.pkl"
METHODS = ("lowrank", "fedpara", "pfedpara")


@pytest.fixture
def pickled():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return pickle.loads(GOLDEN.read_bytes())


@pytest.mark.parametrize("method", METHODS)
def test_weights_are_composed_as_they_were(pickled, method):
    model, dense = pickled[method]
    found = fedpara.to_dense(model).state_dict()
    assert list(found) == list(dense)
    for name, value in dense.items():
        torch.testing.assert_close(found[name], value)
    assert any(isinstance(layer, FactorisedLayer) for layer in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_everything_that_takes_a_model_takes_it(pickled, method):
    model, _ = pickled[method]
    assert method in str(fedpara.report(model))
    spec = fedpara.ModelSpec.of(model)
    fresh = fedpara.ModelSpec.of(pickle.loads(pickle.dumps(model)))
    spec.check_equal(fresh, here="pickled before", there="pickled now")
    assert len(fedpara.split(model).private) == len(spec.private_keys)
    torch.fx.symbolic_trace(model["linear"])
    for layer in model.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()


@pytest.mark.parametrize("method", METHODS)
def test_it_trains_with_its_options(pickled, method):
    model, _ = pickled[method]
    progress = round_progress(model)
    assert type(progress) is RoundProgress
    assert progress.decoupled is (method == "pfedpara")
    start_round(model, previous_steps=10)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x = model["linear"](torch.randn(4, 12))
        model["head"](x).square().sum().backward()
        optimizer.step()
    assert progress.steps == 3
    moved = [n for n, v in model.state_dict().items() if not torch.equal(v, before[n])]
    assert any(name.startswith("linear") for name in moved)


@pytest.mark.parametrize("module", ["training", "training.step_hooks"])
def test_the_class_of_the_progress_has_its_old_name(module):
    import importlib

    found = importlib.import_module(f"fedpara_plugins.{module}")
    for old, new in (("Training", "RoundProgress"), ("training_of", "round_progress")):
        with pytest.warns(DeprecationWarning, match=f"{old} has been renamed {new}"):
            assert getattr(found, old) is getattr(found, new)
