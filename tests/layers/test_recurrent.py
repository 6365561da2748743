import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fedpara_plugins as fedpara
from fedpara_plugins.factors.plan import WeightPlan
from fedpara_plugins.layers import FactorisedGRU, FactorisedLSTM
from fedpara_plugins.testing.brute_force import reference_weight
from fedpara_plugins.testing.layer_contract import LayerContract

METHODS = ("lowrank", "fedpara", "pfedpara")
BOTH_WAYS = {"num_layers": 2, "bidirectional": True}


class TestLSTM(LayerContract):
    dense_class = nn.LSTM

    def cases(self):
        x = torch.randn(5, 3, 32)
        state = (torch.randn(4, 3, 32), torch.randn(4, 3, 48))
        return [
            (nn.LSTM(32, 40), x),
            (nn.LSTM(32, 24, num_layers=2, batch_first=True, bias=False), x),
            (nn.LSTM(32, 48, proj_size=32, **BOTH_WAYS), (x, state)),
        ]


class TestGRU(LayerContract):
    dense_class = nn.GRU

    def cases(self):
        x = torch.randn(5, 3, 32)
        return [
            (nn.GRU(32, 40, batch_first=True), x),
            (nn.GRU(32, 32, bias=False, **BOTH_WAYS), (x, torch.randn(4, 3, 32))),
        ]


class TestLSTMWithTanh(LayerContract):
    dense_class = nn.LSTM
    options = {"tanh": True}

    def cases(self):
        return [(nn.LSTM(32, 40), torch.randn(5, 3, 32))]


LAYERS = {
    "lstm": lambda: nn.LSTM(32, 48, proj_size=32, **BOTH_WAYS),
    "lstm_batch_first": lambda: nn.LSTM(32, 40, num_layers=2, batch_first=True),
    "gru": lambda: nn.GRU(32, 40, **BOTH_WAYS),
    "gru_batch_first": lambda: nn.GRU(32, 40, bias=False, batch_first=True),
}


@pytest.fixture(params=LAYERS)
def pair(request):
    """A factorised layer with all its factors away from zero, and its dense twin."""
    torch.manual_seed(0)
    layer = scattered(fedpara.convert(LAYERS[request.param](), method="pfedpara", gamma=0.3))
    return layer, fedpara.to_dense(layer)


def scattered(model):
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


def states(layer, *batch):
    directions = (2 if layer.bidirectional else 1) * layer.num_layers
    hidden = torch.randn(directions, *batch, layer.proj_size or layer.hidden_size)
    cell = torch.randn(directions, *batch, layer.hidden_size)
    return (hidden, cell) if isinstance(layer, nn.LSTM) else hidden


# The same as dense, in all that goes in and comes out


@pytest.mark.parametrize("given", [True, False], ids=["given", "no_state"])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one_sequence"])
def test_all_outputs_with_and_without_states(pair, given, batched):
    layer, dense = pair
    x = torch.randn(3, 3, 32) if batched else torch.randn(6, 32)
    hx = states(layer, *([3] if batched else [])) if given else None
    assert_same(layer(x, hx), dense(x, hx))


@pytest.mark.parametrize("sorted_lengths", [True, False])
def test_packed_sequences(pair, sorted_lengths):
    layer, dense = pair
    lengths = torch.tensor([6, 4, 1] if sorted_lengths else [2, 6, 3])
    first = layer.batch_first
    x = torch.randn(3, 6, 32) if first else torch.randn(6, 3, 32)
    packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=sorted_lengths)
    hx = states(layer, 3)
    (got, state), (expected, dense_state) = layer(packed, hx), dense(packed, hx)
    assert_same(pad_packed_sequence(got), pad_packed_sequence(expected))
    assert_same(state, dense_state)
    # A padded step must not be seen: one sequence alone gives what it gives in the batch.
    alone = x[1:2, : lengths[1]] if first else x[: lengths[1], 1:2]
    own = tuple(h[:, 1:2] for h in hx) if isinstance(hx, tuple) else hx[:, 1:2]
    output, _ = layer(alone, own)
    padded, _ = pad_packed_sequence(got, batch_first=first)
    row = padded[1:2, : lengths[1]] if first else padded[: lengths[1], 1:2]
    torch.testing.assert_close(output, row, rtol=1e-4, atol=1e-5)


def test_dropout_between_layers_is_drawn_as_dense():
    torch.manual_seed(0)
    layer = fedpara.convert(nn.LSTM(32, 40, num_layers=3, dropout=0.5), gamma=0.3)
    dense, x = fedpara.to_dense(layer), torch.randn(5, 3, 32)

    def seeded(module):
        torch.manual_seed(1)
        return module(x)[0]

    in_training = seeded(layer)
    assert_same(in_training, seeded(dense))
    assert_same(seeded(layer.eval()), seeded(dense.eval()))
    assert (seeded(layer) - in_training).abs().max() > 0.01


def assert_same(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# By brute force: the cells written out, in float64


def lstm_cell(x, state, w):
    h, c = state
    gates = x @ w["ih"].T + w["bias_ih"] + h @ w["hh"].T + w["bias_hh"]
    i, f, g, o = gates.chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return (h @ w["hr"].T if "hr" in w else h), c


def gru_cell(x, state, w):
    (h,) = state
    at_input = (x @ w["ih"].T + w["bias_ih"]).chunk(3, dim=1)
    at_hidden = (h @ w["hh"].T + w["bias_hh"]).chunk(3, dim=1)
    r, z = ((a + b).sigmoid() for a, b in zip(at_input[:2], at_hidden[:2], strict=True))
    n = (at_input[2] + r * at_hidden[2]).tanh()
    return ((1 - z) * n + z * h,)


def unrolled(layer, x, parameters):
    """All layers and directions, step by step, from factors; gates as torch documents them."""
    cell = lstm_cell if isinstance(layer, nn.LSTM) else gru_cell
    for depth in range(layer.num_layers):
        directions = []
        for suffix in ("", "_reverse")[: 2 if layer.bidirectional else 1]:
            w = cell_weights(layer, f"l{depth}{suffix}", parameters)
            zero = x.new_zeros(x.shape[1], w["hh"].shape[1])
            state = (zero, x.new_zeros(x.shape[1], layer.hidden_size))[: 2 if "hr" in w else None]
            state = state if cell is lstm_cell else (zero,)
            outputs = []
            for step in x.flip(0) if suffix else x:
                state = cell(step, state, w)
                outputs.append(state[0])
            directions.append(torch.stack(outputs[::-1] if suffix else outputs))
        x = torch.cat(directions, dim=2)
    return x


def cell_weights(layer, place, parameters):
    found = {}
    for part in ("ih", "hh", "hr"):
        weight = f"weight_{part}_{place}"
        if weight in layer.plans:
            names = layer.plans[weight].factor_names
            factors = {name: parameters[f"{weight}_{name}"] for name in names}
            found[part] = reference_weight(layer, weight, factors)
        elif weight in parameters:
            found[part] = parameters[weight]
    for part in ("bias_ih", "bias_hh"):
        found[part] = parameters[f"{part}_{place}"]
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(32, 40),
        lambda: nn.LSTM(32, 36, proj_size=24, **BOTH_WAYS),
        lambda: nn.GRU(32, 24, **BOTH_WAYS),
    ],
    ids=["lstm", "lstm_projected", "gru"],
)
def test_forward_and_gradients_equal_cells_written_out(make, method):
    torch.manual_seed(0)
    layer = scattered(fedpara.convert(make(), method=method, gamma=0.3, min_size=1000)).double()
    x = torch.randn(4, 3, 32, dtype=torch.float64)
    output, _ = layer(x)
    probe = torch.randn_like(output)
    grads = torch.autograd.grad((output * probe).sum(), list(layer.parameters()))
    copies = {k: v.detach().clone().requires_grad_() for k, v in layer.named_parameters()}
    expected = unrolled(layer, x, copies)
    wanted = torch.autograd.grad((expected * probe).sum(), list(copies.values()))
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for name, got, want in zip(copies, grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10, msg=name)


# Names, and what stays dense


def test_names_stand_where_the_weights_stood():
    dense = nn.LSTM(32, 40, proj_size=8)
    layer = fedpara.convert(copy.deepcopy(dense), gamma=0.3)
    assert type(layer) is FactorisedLSTM
    assert list(layer.state_dict()) == [
        "weight_ih_l0_x1", "weight_ih_l0_y1", "weight_ih_l0_x2", "weight_ih_l0_y2",
        "weight_hh_l0_x1", "weight_hh_l0_y1", "weight_hh_l0_x2", "weight_hh_l0_y2",
        "bias_ih_l0", "bias_hh_l0", "weight_hr_l0",
    ]  # fmt: skip
    assert list(fedpara.to_dense(layer).state_dict()) == list(dense.state_dict())


def test_weights_too_small_stay_parameters_of_the_layer():
    dense = nn.GRU(6, 48)
    model = fedpara.convert(nn.Sequential(dense), gamma=0.3)
    layer = model[0]
    assert type(layer) is FactorisedGRU
    assert list(layer.plans) == ["weight_hh_l0"]
    assert layer.weight_ih_l0 is dense.weight_ih_l0
    for converted in (model, copy.deepcopy(model)):
        notes = {row.name: row.note for row in fedpara.report(converted).rows}
        assert notes["0.weight_hh_l0"] == "fedpara"
        kept = notes["0.weight_ih_l0+bias_ih_l0+bias_hh_l0"]
        assert kept == "dense: weight_ih_l0: 864 parameters, fewer than min_size=1,024"


def test_tied_layers_stay_tied():
    dense = nn.LSTM(32, 32, num_layers=2)
    dense.weight_hh_l1 = dense.weight_hh_l0
    layer = fedpara.convert(dense, gamma=0.3)
    assert list(layer.plans) == ["weight_ih_l0", "weight_ih_l1"]
    assert layer.weight_hh_l1 is layer.weight_hh_l0
    assert "weight_hh_l1: tied to another weight of the layer" in str(fedpara.report(layer))


def test_weights_read_as_attributes_and_as_lists():
    layer = fedpara.convert(nn.LSTM(32, 40), method="fedpara")
    factors = layer.factors("weight_hh_l0")
    expected = reference_weight(layer, "weight_hh_l0", factors)
    torch.testing.assert_close(layer.weight_hh_l0, expected)
    torch.testing.assert_close(layer.all_weights[0][1], expected)
    with pytest.raises(AttributeError, match="weight_hh_l7"):
        layer.weight_hh_l7  # noqa: B018
    with pytest.raises(fedpara.ConversionError, match="weight_hh_l0 of this lstm layer"):
        layer.weight_hh_l0 = nn.Parameter(torch.zeros(160, 40))


# What the layer keeps, and how often it composes


@pytest.mark.parametrize("name", LAYERS)
def test_composes_every_weight_once_per_forward_and_never_else(name, monkeypatch):
    layer = fedpara.convert(LAYERS[name](), method="fedpara", gamma=0.3)
    composed, ordered = [], WeightPlan.ordered

    def counted(plan, factors):
        composed.append(plan.name)
        return ordered(plan, factors)

    monkeypatch.setattr(WeightPlan, "ordered", counted)  # whoever composes needs them in order
    layer.flatten_parameters()
    copy.deepcopy(layer).double()
    assert composed == []
    layer(torch.randn(50, 3, 32))
    assert sorted(composed) == sorted(layer.plans)


def test_no_tensor_but_parameters_stays_in_the_layer():
    model = nn.Sequential(nn.LSTM(32, 40))
    weight = weakref.ref(model[0].weight_ih_l0)
    layer = fedpara.convert(model, gamma=0.3)[0]
    gc.collect()
    assert weight() is None
    layer(torch.randn(5, 3, 32))[0].sum().backward()
    layer.double()
    held = [value for key, value in vars(layer).items() if key != "_parameters"]
    assert not [t for t in tensors_in(held) if isinstance(t, (torch.Tensor, weakref.ref))]


def tensors_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for part in value for leaf in tensors_in(part)]
    return [value]


def test_a_copy_trains_on_its_own():
    """What a cached list of weights gets wrong: the copy would go on with the old ones."""
    torch.manual_seed(0)
    layer, x = fedpara.convert(nn.LSTM(32, 40), gamma=0.3), torch.randn(5, 3, 32)
    layer(x)[0].sum().backward()
    other, before = copy.deepcopy(layer), layer(x)[0]
    other(x)[0].sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    torch.testing.assert_close(layer(x)[0], before)
    assert (other(x)[0] - before).abs().max() > 1e-3


def test_dense_copy_is_a_working_layer():
    dense = fedpara.to_dense(fedpara.convert(nn.LSTM(32, 40), gamma=0.3))
    x = torch.randn(5, 3, 32)
    before = dense(x)[0]
    with torch.no_grad():
        dense.weight_hh_l0.mul_(2)
    assert (dense(x)[0] - before).abs().max() > 1e-3
    assert copy.deepcopy(dense).double()(x.double())[0].dtype == torch.float64


def test_reset_draws_everything_anew():
    torch.manual_seed(0)
    layer = fedpara.convert(nn.LSTM(6, 40), gamma=0.3)
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not any(torch.equal(value, before[k]) for k, value in layer.state_dict().items())
    for weight in ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
        assert getattr(layer, weight).var().item() == pytest.approx(1 / 120, rel=0.2)


# Bad input


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(5, 3, 32, dtype=torch.float64), ValueError, "LSTM.*float32.*float64"),
        (torch.zeros(5, 3, 33), RuntimeError, r"32 \(input_size\).*\(5, 3, 33\)"),
        (torch.zeros(5, 3, 2, 32), ValueError, "3D"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_as_by_the_dense_layer(x, error, says):
    with pytest.raises(error):
        nn.LSTM(32, 40)(x)
    with pytest.raises(error, match=says):
        fedpara.convert(nn.LSTM(32, 40))(x)


def test_packed_data_of_too_many_dimensions_is_refused_as_by_the_dense_layer():
    packed = PackedSequence(torch.zeros(5, 2, 32), torch.tensor([3, 2]))
    with pytest.raises(RuntimeError):
        nn.GRU(32, 40)(packed)
    with pytest.raises(RuntimeError, match=r"GRU.*2 dimensions"):
        fedpara.convert(nn.GRU(32, 40))(packed)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_autocast_takes_inputs_of_either_precision(kind):
    torch.manual_seed(0)
    layer, x = fedpara.convert(kind(32, 40), gamma=0.3), torch.randn(5, 3, 32)
    expected = layer(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            kind(32, 40)(x)
        except RuntimeError as error:  # the LSTM on a CPU without AVX-512
            pytest.skip(f"torch's own layer does not run here: {error}")
        for inputs in (x, x.bfloat16()):
            assert (layer(inputs)[0].float() - expected).norm() / expected.norm() < 0.05


# A whole model


class LanguageModel(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.embed = nn.Embedding(30, 32)
        self.recurrent = recurrent(32, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, 30)

    def forward(self, text):
        self.recurrent.flatten_parameters()
        output, _ = self.recurrent(self.embed(text))
        return self.head(output)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU])
def test_language_model_trains_and_comes_back(recurrent, method):
    torch.manual_seed(0)
    model = fedpara.convert(LanguageModel(recurrent), method=method, gamma=0.3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    text = (torch.arange(20) * torch.arange(1, 9)[:, None]) % 30
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    plain = LanguageModel(recurrent)
    plain.load_state_dict(fedpara.to_dense(model).state_dict(), strict=True)
    assert_same(plain(text), model(text))
    assert_same(fedpara.to_dense(model)(text), model(text))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(text), model(text))
