"""Label counts in the logits: how they get in, and what is said when they do not."""

import copy
import doctest
import logging

import numpy as np
import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import ConfigError
from fedpara_plugins.training import label_counts

CLASSES = 5
LABELS = [0, 0, 3, 0, 3, 4]
COUNTS = [3, 0, 0, 2, 1]


def net():
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, CLASSES))


def build(**options):
    return fedpara.convert(
        net(), **{"method": "pfedpara", "gamma": 0.3, "label_prior": True, **options}
    )


def expected():
    return torch.tensor([np.log((n + 0.1) / (6 + 1)) for n in COUNTS], dtype=torch.float32)


@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        tuple(LABELS),
        iter(LABELS),
        np.array(LABELS),
        np.array(LABELS, dtype=np.uint8),
        torch.tensor(LABELS),
        torch.tensor(LABELS, dtype=torch.uint8),
        [torch.tensor(label) for label in LABELS],
        [np.int64(label) for label in LABELS],
    ],
    ids=lambda value: type(value).__name__,
)
def test_labels_of_any_kind_give_the_logarithms_of_their_frequencies(labels):
    model = build()
    fedpara.set_label_counts(model, labels)
    torch.testing.assert_close(model[2].label_prior.detach(), expected(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("counts", [COUNTS, np.array(COUNTS), torch.tensor(COUNTS).float()])
def test_counts_do_as_well(counts):
    model = build()
    fedpara.set_label_counts(model, counts=counts)
    torch.testing.assert_close(model[2].label_prior.detach(), expected(), rtol=1e-6, atol=1e-6)


def test_many_labels_of_a_small_dtype_do_not_overflow():
    model = build()
    fedpara.set_label_counts(model, torch.ones(70_000, dtype=torch.uint8))
    assert model[2].label_prior[1].item() == pytest.approx(np.log(70_000.1 / 70_001), abs=1e-6)
    assert model[2].label_prior[0].item() == pytest.approx(np.log(0.1 / 70_001), rel=1e-6)


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
@pytest.mark.parametrize("training", [True, False])
def test_logits_move_by_the_prior_under_every_method(method, training):
    torch.manual_seed(0)
    model = build(method=method).train(training)
    x = torch.randn(4, 64)
    before = model(x)
    fedpara.set_label_counts(model, LABELS)
    torch.testing.assert_close(model(x) - before, expected().expand(4, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_the_prior_is_private_and_nothing_else_because_of_it(method):
    with_it, without = build(method=method), build(method=method, label_prior=False)
    more = set(fedpara.split(with_it).private) - set(fedpara.split(without).private)
    assert more == {"2.label_prior"}
    assert list(fedpara.split(with_it).shared) == list(fedpara.split(without).shared)


def test_on_models_without_the_option_nothing_happens():
    for model in (net(), build(label_prior=False), nn.ReLU()):
        before = copy.deepcopy(model.state_dict())
        fedpara.set_label_counts(model, LABELS)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_counts_reach_a_wrapped_model():
    model = build()
    fedpara.set_label_counts(nn.ModuleDict({"inner": nn.DataParallel(model)}), LABELS)
    torch.testing.assert_close(model[2].label_prior.detach(), expected())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([],), "there are no labels"),
        (([0, 5],), "label 5 is out of range: the layer has 5 outputs, expected 0 to 4"),
        (([0, -100],), "label -100 is out of range"),
        (([0.0, 1.0],), r"integer class index.*float32.*shape \(2,\)"),
        ((torch.eye(5, dtype=torch.int64),), r"argmax\(1\)"),
        ((3,), "integer class index"),
        ((["cat", "dog"],), "labels are no numbers"),
        ((None,), "either labels or counts"),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(arguments, words):
    model = build()
    with pytest.raises(ConfigError, match=words):
        fedpara.set_label_counts(model, *arguments)
    assert not model[2].label_prior.any()


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ([1, 2], r"expected 5 counts, one per output of the layer, got shape \(2,\)"),
        ([0, 0, 0, 0, 0], "some above 0"),
        ([1, -1, 0, 0, 0], "0 or more"),
        ([1, float("nan"), 0, 0, 0], "0 or more"),
    ],
)
def test_counts_that_cannot_be_meant_are_refused(counts, words):
    with pytest.raises(ConfigError, match=words):
        fedpara.set_label_counts(build(), counts=counts)
    with pytest.raises(ConfigError, match="either labels or counts"):
        fedpara.set_label_counts(build(), LABELS, counts=counts)


def test_the_example_in_the_docstring():
    names = {"nn": nn, "convert": fedpara.convert}
    results = doctest.testmod(label_counts, extraglobs=names)
    assert (results.attempted, results.failed) == (3, 0)


# The warning


@pytest.fixture
def warned(caplog, monkeypatch):
    monkeypatch.setattr(label_counts, "_warned", set())
    caplog.set_level(logging.WARNING)
    return caplog


def step(model, times=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(times):
        model(torch.ones(2, 64)).square().mean().backward()
        optimizer.step()


def test_training_without_counts_is_warned_of_once(warned):
    for model in (build(), build()):
        step(model, 2)
    (record,) = warned.records
    assert "set_label_counts(model, labels)" in record.getMessage()
    assert "overwritten" not in record.getMessage()


def test_counts_that_a_loaded_state_overwrote_are_named(warned):
    model = build()
    state = copy.deepcopy(model.state_dict())
    fedpara.set_label_counts(model, LABELS)
    model.load_state_dict(state)
    step(model)
    (record,) = warned.records
    assert "overwritten" in record.getMessage()


def test_no_warning_with_counts_or_without_the_option(warned):
    model = build()
    fedpara.set_label_counts(model, LABELS)
    loaded = build()
    loaded.load_state_dict(model.state_dict())
    for quiet in (model, loaded, build(label_prior=False)):
        step(quiet)
    assert not warned.records
