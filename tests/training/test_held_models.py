"""Which models an optimizer trains: by any of their parameters, in copies too."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.training.held_models import held_models
from fedpara_plugins.training.progress import DenseParameters
from fedpara_plugins.training.step_hooks import round_progress


def build(**options):
    torch.manual_seed(0)
    layers = [nn.Linear(64, 64), nn.Linear(64, 8), nn.LayerNorm(8)]
    return fedpara.convert(
        nn.Sequential(*layers), method="fedpara", gamma=0.3, exclude="1", **options
    )


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_all_of_a_model_and_parts_of_it():
    model = build()
    for parameters, whole in [
        (model.parameters(), True),
        (model[0].parameters(), False),
        (model[1].parameters(), False),
        (model[2].parameters(), False),
    ]:
        optimizer = sgd(parameters)
        (held,) = held_models(optimizer)
        own = {id(p) for p in optimizer.param_groups[0]["params"]}
        assert held.progress is round_progress(model)
        assert held.is_whole == whole
        assert {id(p) for p in held.own} == own
        assert {id(p) for p in held.others()} == {id(p) for p in model.parameters()} - own
        assert held.layers == [model[0]]
    assert held_models(sgd(nn.Linear(2, 2).parameters())) == []
    assert held_models(sgd(fedpara.to_dense(model).parameters())) == []


def test_copies_are_models_of_their_own():
    model = build()
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for other in copies:
        (held,) = held_models(sgd(other[2].parameters()))
        assert held.progress is round_progress(other)
        assert held.progress is not round_progress(model)
        assert {id(p) for p in held.progress.dense} == {
            id(p) for part in (other[1], other[2]) for p in part.parameters()
        }
    (held,) = held_models(sgd(model[2].parameters()))
    assert held.progress is round_progress(model)


def test_a_copy_of_one_layer_keeps_no_others_alive():
    model = build()
    alone = copy.deepcopy(model[0])
    gc.collect()
    assert list(alone.progress.dense) == []
    dense = weakref.ref(model[1])
    kept = model[0]
    del model
    gc.collect()
    assert dense() is None
    assert list(kept.progress.dense) == []


def test_state_and_pickles_do_not_grow_by_it():
    model = build()
    size = len(pickle.dumps(model))
    for layer in model:
        layer.__dict__.pop("progress", None)
    assert size - len(pickle.dumps(model)) < 5000
    assert "dense" not in " ".join(model.state_dict())


@pytest.mark.parametrize("copied", [False, True])
def test_parameters_that_a_model_gets_later_are_its_own(copied):
    model = build(clip=0.5)
    model = copy.deepcopy(model) if copied else model
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    model[2] = nn.Linear(8, 8)
    both = [torch.optim.SGD(p.parameters(), lr=1.0) for p in (model[0], model[1:])]
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    (100 * model(torch.ones(2, 64)).square().mean()).backward()
    for optimizer in both:
        (held,) = held_models(optimizer)
        assert held.progress is round_progress(model)
        assert len(held.own) + len(held.others()) == len(list(model.parameters()))
        optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-3)


def test_dense_parameters_forget_those_that_are_gone():
    kept = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    dense = DenseParameters(kept)
    assert [id(p) for p in dense] == [id(p) for p in kept]
    del kept[0]
    gc.collect()
    assert [id(p) for p in dense] == [id(p) for p in kept]


def test_an_optimizer_keeps_no_model_alive_but_its_own():
    model = build()
    optimizer = sgd(model[1].parameters())
    held_models(optimizer)
    layer = weakref.ref(model[0])
    del model
    gc.collect()
    assert layer() is None


def test_many_threads_may_search_at_once():
    import threading

    failures = []

    def train():
        try:
            for _ in range(8):
                model = build()
                optimizer = sgd(model.parameters())
                model(torch.ones(2, 64)).sum().backward()
                optimizer.step()
                assert round_progress(model).steps == 1
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
