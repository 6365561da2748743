import copy

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers import FactorisedEmbedding, FactorisedEmbeddingBag
from fedpara_plugins.testing.layer_contract import LayerContract

METHODS = ("lowrank", "fedpara", "pfedpara")


class TestEmbedding(LayerContract):
    dense_class = nn.Embedding

    def cases(self):
        tokens = torch.randint(0, 120, (4, 30))
        return [
            (nn.Embedding(120, 64), tokens),
            (nn.Embedding(120, 64), tokens[:, :9]),
            (nn.Embedding(120, 64), torch.tensor(7)),
            (nn.Embedding(120, 64, padding_idx=5), torch.tensor([[5, 1, 5], [2, 2, 119]])),
            (nn.Embedding(120, 64, padding_idx=-1), torch.cat([tokens, tokens * 0 + 119], 1)),
            (nn.Embedding(120, 64, scale_grad_by_freq=True), tokens),
            (nn.Embedding(120, 64, scale_grad_by_freq=True), tokens[:, :9]),
        ]


class TestEmbeddingBag(LayerContract):
    dense_class = nn.EmbeddingBag

    def cases(self):
        tokens = torch.randint(0, 120, (4, 30))
        return [
            (nn.EmbeddingBag(120, 64), tokens),
            (nn.EmbeddingBag(120, 64, mode="max", padding_idx=3), tokens),
            (nn.EmbeddingBag(120, 64, mode="sum"), (tokens.flatten(), torch.tensor([0, 7, 60]))),
        ]


def trained(model, tokens, *, make=lambda p: torch.optim.SGD(p, lr=0.5), steps=5):
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        (model(tokens) - 1).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.05),
    ],
    ids=["sgd", "adamw"],
)
def test_a_zero_padding_row_stays_exactly_zero(method, make):
    torch.manual_seed(0)
    model = fedpara.convert(nn.Embedding(120, 64, padding_idx=5), method=method)
    before = model.weight.detach().clone()
    trained(model, torch.tensor([[5, 1, 2, 5, 5]]), make=make)
    assert not model.weight[5].any()
    assert not model(torch.tensor([5])).any()
    assert not fedpara.to_dense(model).weight[5].any()
    # All rows but that one move, also those of tokens that never came.
    assert bool((model.weight != before).any(1)[torch.arange(120) != 5].all())


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("init", ["random", "fit"])
def test_zero_after_every_way_to_start(kind, init):
    torch.manual_seed(0)
    model = fedpara.convert(kind(120, 64, padding_idx=5), method="fedpara", init=init)
    assert not model.weight[5].any()
    assert bool(model.weight[:5].any(1).all())
    model.x1.data.normal_()
    model.reset_parameters()
    assert not model.weight[5].any()


def test_a_filled_padding_row_is_composed_and_gets_no_gradient_of_its_own():
    torch.manual_seed(0)
    dense = nn.Embedding(120, 64, padding_idx=5)
    nn.init.normal_(dense.weight)
    model = fedpara.convert(copy.deepcopy(dense), method="fedpara", init="fit")
    torch.testing.assert_close(model(torch.tensor([5]))[0], model.weight[5])
    assert bool(model.weight[5].all())
    first = model.x1.detach().clone()
    trained(model, torch.tensor([5, 5, 1]))
    assert torch.equal(model.x1[5], first[5])
    assert not torch.equal(model.x1[1], first[1])


@pytest.mark.parametrize(
    ("options", "word"), [({"max_norm": 1.0}, "max_norm"), ({"sparse": True}, "sparse")]
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_what_a_composed_table_cannot_do_stays_dense(kind, options, word):
    model = nn.Sequential(kind(120, 64, **options), nn.Linear(64, 64))
    fedpara.convert(model, method="fedpara")
    assert type(model[0]) is kind
    assert word in fedpara.report(model).rows[0].note
    sizes = {p.shape for p in trained(model, torch.randint(0, 120, (3, 4))).parameters()}
    assert (120, 64) in sizes


def test_tied_to_a_linear_layer_stays_tied():
    model = nn.Sequential(nn.Embedding(120, 64), nn.Linear(64, 64), nn.Linear(64, 120, bias=False))
    model[2].weight = model[0].weight
    fedpara.convert(model, method="fedpara")
    assert model[2].weight is model[0].weight
    notes = {row.name: row.note for row in fedpara.report(model).rows}
    assert notes["0"] == "dense: tied to 2"


def test_classes():
    assert type(fedpara.convert(nn.Embedding(99, 64))) is FactorisedEmbedding
    assert type(fedpara.convert(nn.EmbeddingBag(99, 64))) is FactorisedEmbeddingBag


@pytest.mark.parametrize(("count", "rows"), [(119, 119), (150, 120)])
def test_a_short_batch_composes_its_own_rows_only(count, rows, monkeypatch):
    model = fedpara.convert(nn.Embedding(120, 64), method="fedpara")
    tokens, table = torch.arange(count).flip(0) % 120, model.weight
    shapes, compose = [], WeightPlan._composed

    def observed(plan, factors):
        value, by_hand = compose(plan, factors)
        shapes.append(tuple(value.shape))
        return value, by_hand

    monkeypatch.setattr(WeightPlan, "_composed", observed)
    torch.testing.assert_close(model(tokens), table[tokens])
    assert shapes == [(rows, 64)]


@pytest.mark.parametrize("tokens", [torch.tensor([3, 5]), torch.arange(120)])
def test_the_phase_of_training_holds_for_short_and_long_batches(tokens):
    model = fedpara.convert(nn.Embedding(120, 64), method="pfedpara")
    model.x2.data.normal_()
    expected = {"private": {"x2", "y2"}, "shared": {"x1", "y1"}}
    for phase, names in expected.items():
        model.phase = phase
        model.zero_grad()
        model(tokens).square().sum().backward()
        moved = {k for k, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == names


def test_an_index_out_of_range_is_refused_as_by_the_dense_layer():
    model = fedpara.convert(nn.Embedding(120, 64))
    for layer in (nn.Embedding(120, 64), model):
        with pytest.raises(IndexError, match="out of range"):
            layer(torch.tensor([120]))


def test_whoever_observes_the_composed_weight_sees_the_whole_table():
    model, seen = fedpara.convert(nn.Embedding(120, 64)), []
    model.on_composed = lambda name, value: seen.append((name, tuple(value.shape)))
    model(torch.tensor([3]))
    assert seen == [("weight", (120, 64))]


@pytest.mark.parametrize("tokens", [7, 400])
def test_autocast_leaves_rows_as_they_are(tokens):
    """As it does with a dense table: embeddings are not among what it casts."""
    indices = torch.randint(0, 200, (tokens,))
    for build in (nn.Embedding, nn.EmbeddingBag):
        layer = fedpara.convert(build(200, 64), method="fedpara")
        given = indices if build is nn.Embedding else indices.unsqueeze(0)
        expected = layer(given)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(layer(given), expected)
            with torch.no_grad(), fedpara.composed_once(layer):
                torch.testing.assert_close(layer(given), expected)
