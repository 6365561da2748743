import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

import fedpara_plugins as fedpara
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers import FactorisedAttentionOutput, FactorisedMultiheadAttention
from fedpara_plugins.testing.brute_force import reference_weight
from fedpara_plugins.testing.layer_contract import LayerContract

METHODS = ("lowrank", "fedpara", "pfedpara")

PADDING = torch.arange(7) >= torch.tensor([[7], [4], [6]])
CAUSAL = torch.ones(7, 7).triu(1).bool()


class TestMultiheadAttention(LayerContract):
    dense_class = nn.MultiheadAttention

    def cases(self):
        x, memory = torch.randn(5, 3, 48), torch.randn(7, 3, 48)
        wide, narrow = torch.randn(3, 7, 64), torch.randn(3, 7, 40)
        return [
            (nn.MultiheadAttention(48, 4), (x, x, x)),
            (nn.MultiheadAttention(48, 3, bias=False, add_zero_attn=True), (x, memory, memory)),
            (nn.MultiheadAttention(48, 4, add_bias_kv=True), (x, memory, memory, PADDING)),
            (
                nn.MultiheadAttention(48, 4, kdim=64, vdim=40, batch_first=True),
                (x.transpose(0, 1), wide, narrow, PADDING),
            ),
        ]


class TestAttentionOutput(LayerContract):
    dense_class = NonDynamicallyQuantizableLinear

    def cases(self):
        return [(NonDynamicallyQuantizableLinear(64, 64), torch.randn(5, 64))]


def scattered(model):
    for name, parameter in model.named_parameters():
        scale = 0.3 if name.endswith(("x2", "t2")) else 0.05
        parameter.data.add_(torch.randn_like(parameter) * scale)
    return model


def pair(dense, **options):
    """A factorised model with all factors away from their start, and its dense twin."""
    model = scattered(fedpara.convert(dense, method="pfedpara", gamma=0.3, **options))
    return model, fedpara.to_dense(model)


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def grad_mode(grad):
    return contextlib.nullcontext() if grad else torch.no_grad()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# The same as dense, in all that goes in and comes out


ARGUMENTS = {
    "plain": {},
    "no_weights": {"need_weights": False},
    "weights_of_each_head": {"average_attn_weights": False},
    "padding": {"key_padding_mask": PADDING},
    "mask": {"attn_mask": CAUSAL},
    "mask_of_floats": {"attn_mask": torch.linspace(-1, 1, 49).view(7, 7)},
    "masks_of_heads": {"attn_mask": CAUSAL.expand(12, 7, 7)},
    "both_masks": {"attn_mask": CAUSAL, "key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "length_first"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_all_arguments_mean_the_same(arguments, batch_first, training, grad):
    model, dense = pair(nn.MultiheadAttention(48, 4, batch_first=batch_first))
    model.train(training)
    dense.train(training)
    x = torch.randn(3, 7, 48) if batch_first else torch.randn(7, 3, 48)
    other = torch.randn_like(x)
    with grad_mode(grad):
        for inputs in ((x, x, x), (x, other, other), (x, other, x)):
            assert_same(model(*inputs, **arguments), dense(*inputs, **arguments))


def test_one_sequence_without_a_batch():
    model, dense = pair(nn.MultiheadAttention(48, 4, batch_first=True))
    x, memory = torch.randn(5, 48), torch.randn(7, 48)
    assert_same(model(x, memory, memory), dense(x, memory, memory))


def test_the_causal_hint_needs_its_mask_as_dense():
    x = torch.randn(7, 3, 48)
    for layer in pair(nn.MultiheadAttention(48, 4)):
        with pytest.raises(RuntimeError, match="is_causal"):
            layer(x, x, x, is_causal=True)


def test_self_attention_is_one_product_also_batch_first(monkeypatch):
    """torch sees it by the identity of its arguments, which turning them must not lose."""
    seen, forward = [], nn.functional.multi_head_attention_forward

    def watched(query, key, value, *args, **options):
        seen.append((query is key, key is value))
        return forward(query, key, value, *args, **options)

    monkeypatch.setattr(nn.functional, "multi_head_attention_forward", watched)
    model = fedpara.convert(nn.MultiheadAttention(48, 4, batch_first=True), gamma=0.3)
    x, memory = torch.randn(3, 7, 48), torch.randn(3, 7, 48)
    for inputs in ((x, x, x), (x, memory, memory), (x, memory, x)):
        model(*inputs)
    assert seen == [(True, True), (False, True), (False, False)]


def test_dropout_is_drawn_as_dense():
    model, dense = pair(nn.MultiheadAttention(48, 4, dropout=0.5))
    x = torch.randn(7, 3, 48)

    def seeded(module):
        torch.manual_seed(1)
        return module(x, x, x)[0]

    in_training = seeded(model)
    assert_same(in_training, seeded(dense))
    assert_same(seeded(model.eval()), seeded(dense.eval()))
    assert (seeded(model) - in_training).abs().max() > 0.01


def test_nested_tensors_take_the_fast_path_as_dense():
    model, dense = pair(nn.MultiheadAttention(48, 4, batch_first=True))
    parts = [torch.randn(7, 48), torch.randn(4, 48)]
    nested = torch.nested.as_nested_tensor(parts)
    with torch.no_grad():
        got, expected = (
            m.eval()(nested, nested, nested, need_weights=False)[0] for m in (model, dense)
        )
        for part, row, dense_row in zip(parts, got.unbind(), expected.unbind(), strict=True):
            assert_same(row, dense_row)
            assert_same(row, model(part[None], part[None], part[None])[0][0])


@pytest.mark.parametrize("once", [True, False], ids=["composed_once", "alone"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_takes_the_fast_path_when_dense_does(training, grad, once, monkeypatch):
    calls, forward = [], torch._native_multi_head_attention
    monkeypatch.setattr(
        torch, "_native_multi_head_attention", lambda *a: calls.append(1) or forward(*a)
    )
    model, dense = (m.train(training) for m in pair(nn.MultiheadAttention(48, 4, batch_first=True)))
    x = torch.randn(3, 7, 48)
    with grad_mode(grad), fedpara.composed_once(model) if once else contextlib.nullcontext():
        got = model(x, x, x, need_weights=False)[0]
        fast = len(calls)
        expected = dense(x, x, x, need_weights=False)[0]
    assert fast == len(calls) - fast == (not training and not grad)
    assert_same(got, expected)


# By brute force: attention written out, in float64


def attention_written_out(layer, query, key, value, parameters, blocked):
    """One row, one head at a time; queries (length, batch, embed)."""
    weights = [projection(layer, name, parameters) for name in "qkv"]
    biases = parameters["in_proj_bias"].chunk(3)
    sides = (query, key, value)
    q, k, v = (x @ w.T + b for x, w, b in zip(sides, weights, biases, strict=True))
    size = layer.embed_dim // layer.num_heads
    heads = []
    for start in range(0, layer.embed_dim, size):
        one = slice(start, start + size)
        scores = torch.einsum("lbe,sbe->bls", q[..., one], k[..., one]) / size**0.5
        share = scores.masked_fill(blocked, float("-inf")).exp()
        share = share / share.sum(dim=2, keepdim=True)
        heads.append(torch.einsum("bls,sbe->lbe", share, v[..., one]))
    factors = {n: parameters[f"out_proj.{n}"] for n in layer.out_proj.plans["weight"].factor_names}
    weight = reference_weight(layer.out_proj, "weight", factors)
    return torch.cat(heads, dim=2) @ weight.T + parameters["out_proj.bias"]


def projection(layer, name, parameters):
    joint = "in_proj_weight" in layer.plans
    weight = "in_proj_weight" if joint else f"{name}_proj_weight"
    factors = {n: parameters[f"{weight}_{n}"] for n in layer.plans[weight].factor_names}
    whole = reference_weight(layer, weight, factors)
    return whole.chunk(3)["qkv".index(name)] if joint else whole


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [{}, {"kdim": 64, "vdim": 40}], ids=["joint", "apart"])
def test_forward_and_gradients_equal_attention_written_out(sizes, method):
    layer = fedpara.convert(nn.MultiheadAttention(48, 3, **sizes), method=method, gamma=0.3)
    scattered(layer).double()
    query = torch.randn(5, 3, 48).double()
    key = torch.randn(7, 3, sizes.get("kdim", 48)).double()
    value = torch.randn(7, 3, sizes.get("vdim", 48)).double()
    output, _ = layer(query, key, value, key_padding_mask=PADDING, attn_mask=CAUSAL[:5])
    probe = torch.randn_like(output)
    grads = torch.autograd.grad((output * probe).sum(), list(layer.parameters()))
    copies = {k: v.detach().clone().requires_grad_() for k, v in layer.named_parameters()}
    blocked = PADDING[:, None] | CAUSAL[None, :5]
    expected = attention_written_out(layer, query, key, value, copies, blocked)
    wanted = torch.autograd.grad((expected * probe).sum(), list(copies.values()))
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for name, got, want in zip(copies, grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9, msg=name)


# Names, and what stays dense


def test_names_and_classes_there_and_back():
    dense = nn.MultiheadAttention(48, 4, kdim=64, add_bias_kv=True)
    model = fedpara.convert(copy.deepcopy(dense), gamma=0.3)
    assert type(model) is FactorisedMultiheadAttention
    assert type(model.out_proj) is FactorisedAttentionOutput
    assert list(model.state_dict()) == [
        *(f"{w}_proj_weight_{f}" for w in "qkv" for f in ("x1", "y1", "x2", "y2")),
        "in_proj_bias", "bias_k", "bias_v",
        *(f"out_proj.{f}" for f in ("x1", "y1", "x2", "y2", "bias")),
    ]  # fmt: skip
    back = fedpara.to_dense(model)
    assert type(back) is nn.MultiheadAttention
    assert type(back.out_proj) is NonDynamicallyQuantizableLinear
    assert list(back.state_dict()) == list(dense.state_dict())
    assert model.in_proj_weight is None


@pytest.mark.parametrize("kept", ["attention", "attention.out_proj"])
def test_each_half_may_stay_dense(kept):
    holder = nn.ModuleDict({"attention": nn.MultiheadAttention(48, 4, batch_first=True)})
    model, back = pair(holder, exclude=[kept])
    layer, dense = model["attention"], back["attention"]
    assert type(layer) is (
        nn.MultiheadAttention if kept == "attention" else FactorisedMultiheadAttention
    )
    assert type(layer.out_proj) is (
        FactorisedAttentionOutput if kept == "attention" else NonDynamicallyQuantizableLinear
    )
    x = torch.randn(3, 7, 48)
    for training in (True, False):
        layer.train(training)
        dense.train(training)
        assert_same(layer(x, x, x), dense(x, x, x))
    with torch.no_grad():
        assert_same(layer(x, x, x), dense(x, x, x))


def test_reset_draws_everything_anew():
    model = scattered(fedpara.convert(nn.MultiheadAttention(48, 4), gamma=0.3))
    model._reset_parameters()
    assert model.in_proj_weight.var().item() == pytest.approx(1 / 96, rel=0.05)
    assert not model.in_proj_bias.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 64, "vdim": 40}], ids=["joint", "apart"])
def test_composes_every_weight_once_per_forward(training, sizes, monkeypatch):
    model = fedpara.convert(nn.MultiheadAttention(48, 4, batch_first=True, **sizes), gamma=0.3)
    composed, compose = [], WeightPlan.compose

    def counted(plan, *args):
        composed.append(plan.name)
        return compose(plan, *args)

    monkeypatch.setattr(WeightPlan, "compose", counted)
    x, wide, narrow = torch.randn(3, 7, 48), torch.randn(3, 7, 64), torch.randn(3, 7, 40)
    with torch.no_grad():
        model.train(training)(x, wide if sizes else x, narrow if sizes else x)
    assert sorted(composed) == sorted([*model.plans, "weight"])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_who_watches_weights_is_told_of_each_once(training):
    model = fedpara.convert(nn.MultiheadAttention(48, 4, batch_first=True), gamma=0.3)
    seen = []
    for layer in (model, model.out_proj):
        layer.on_composed = lambda weight, _: seen.append(weight)
    x = torch.randn(3, 7, 48)
    with torch.no_grad():
        model.train(training)(x, x, x)
    assert sorted(seen) == ["in_proj_weight", "weight"]


# Inside torch's transformers, whose fast path reads the weights without calling the layers


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, **options)


MODELS = {
    "layer": lambda: encoder_layer(batch_first=True),
    "layer_length_first": lambda: encoder_layer(),
    "layer_norm_first": lambda: encoder_layer(batch_first=True, norm_first=True),
    "layer_gelu": lambda: encoder_layer(batch_first=True, activation="gelu"),
    "layer_without_bias": lambda: encoder_layer(batch_first=True, bias=False),
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(batch_first=True), 2),
    "encoder_not_nested": lambda: nn.TransformerEncoder(
        encoder_layer(batch_first=True), 2, enable_nested_tensor=False
    ),
}
FAST = ("layer", "layer_norm_first", "layer_gelu", "encoder", "encoder_not_nested")


@pytest.fixture
def fast_calls(monkeypatch):
    calls, forward = [], torch._transformer_encoder_layer_fwd

    def counted(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", counted)
    return calls


@pytest.mark.parametrize("masks", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_transformer_encoders(name, training, grad, masks, fast_calls):
    model, dense = pair(MODELS[name]())
    model.train(training)
    dense.train(training)
    x = torch.randn(7, 3, 48) if name == "layer_length_first" else torch.randn(3, 7, 48)
    padding = PADDING if masks in ("padding", "both") else None
    causal = CAUSAL if masks in ("causal", "both") else None
    with grad_mode(grad):
        got = model(x, causal, src_key_padding_mask=padding)
        taken = bool(fast_calls)
        expected = dense(x, causal, src_key_padding_mask=padding)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = dense(x, causal, src_key_padding_mask=padding)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert taken == (name in FAST and not training and not grad)
    assert_same(got, expected)
    # Rows of padding hold zeros after nested tensors and anything otherwise.
    seen = torch.ones(3, 7).bool() if padding is None else ~padding
    seen = seen.T if name == "layer_length_first" else seen
    assert_same(got[seen], slow[seen])


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_whole_transformer_with_a_decoder(training):
    build = nn.Transformer(48, 4, 1, 1, 96, dropout=0.0, batch_first=True)
    model, dense = pair(build)
    assert type(model.decoder.layers[0].multihead_attn) is FactorisedMultiheadAttention
    source, target = torch.randn(3, 7, 48), torch.randn(3, 5, 48)
    masks = {"tgt_mask": CAUSAL[:5, :5], "memory_key_padding_mask": PADDING}
    model.train(training)
    dense.train(training)
    assert_same(model(source, target, **masks), dense(source, target, **masks))
    with torch.no_grad():
        assert_same(model(source, target, **masks), dense(source, target, **masks))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 48)
        self.place = nn.Parameter(torch.linspace(-1, 1, 7 * 48).view(7, 48).sin())
        self.body = nn.TransformerEncoder(encoder_layer(batch_first=True), 2)
        self.head = nn.Linear(48, 30)

    def forward(self, text):
        x = self.embed(text) + self.place
        return self.head(self.body(x, mask=CAUSAL, is_causal=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_transformer_trains_and_comes_back(method):
    model = fedpara.convert(Reader(), method=method, gamma=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    text = (torch.arange(8) * torch.arange(1, 9)[:, None]) % 30
    losses = []
    for _ in range(25):
        loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    plain = Reader()
    plain.load_state_dict(fedpara.to_dense(model).state_dict(), strict=True)
    copied = copy.deepcopy(model)
    for module in (plain, fedpara.to_dense(model), copied):
        assert_same(module(text[:, :-1]), model(text[:, :-1]))
        with torch.no_grad():
            assert_same(module.eval()(text[:, :-1]), model(text[:, :-1]))
