"""The runner of studies: `benchmarks/study`."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
import torch

import fedpara_plugins as fedpara
from fedpara_plugins import ModelSpec

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
RESIDUAL = {"base": "frozen", "rank": 2, "codec": "small"}


@pytest.fixture
def study(monkeypatch):
    """Import a module of the runner, which is a folder of scripts and no package."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(STUDY))
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(STUDY) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def sitting(study, tmp_path, monkeypatch):
    """Return a function that makes a sitting of settings on a small task."""

    def made(*rows):
        draw = torch.Generator().manual_seed(0)

        def share(examples):
            x = torch.randn(examples, 1, 14, 14, generator=draw)
            return x, (x.mean((1, 2, 3)) > 0).long()

        task = study("tasks").Task(
            build=study("networks").mlp,
            clients=[share(40) for _ in range(3)],
            test=share(60),
            rate=0.05,
            own=[share(10) for _ in range(3)],
            before=lambda: share(100),
            sampled=2,
        )
        module = study("sitting")
        monkeypatch.setattr(module, "load", lambda *_: task)
        return module.Sitting(rows, tmp_path, tmp_path / "table.jsonl", tmp_path / "models")

    return made


def setting(study, **fields):
    fields = {"name": "row", "task": "small", "rounds": 3, "pretrained": 5, **fields}
    return study("setting").Setting(**fields)


def weights(method, count=4):
    """Return a residual layer's plan, and the factors of some clients after training."""
    torch.manual_seed(1)
    layer = torch.nn.Sequential(torch.nn.Linear(24, 20))
    spec = ModelSpec.of(fedpara.convert(layer, method=method, base="frozen", rank=3, min_size=1))
    first = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    draw = torch.Generator().manual_seed(2)

    def moved():
        noise = {k: 0.3 * torch.randn(v.shape, generator=draw) for k, v in first.items()}
        return {k: v if k.endswith("_base") else v + noise[k] for k, v in first.items()}

    return spec, first, [(moved(), 1 + number) for number in range(count)]


def dense(spec, state):
    """Return the composed weight W0 + update."""
    return spec.dense_state(state)["0.weight"].double()


def mean_of_weights(spec, replies):
    total = sum(examples for _, examples in replies)
    return sum(dense(spec, state) * examples for state, examples in replies) / total


def test_a_table_is_printed_from_its_file_and_runs_are_done_once(study, sitting, capsys):
    rows = [
        setting(study, name="full, float32"),
        setting(study, name="adapter", options={"method": "lowrank", **RESIDUAL}, every=2),
    ]
    made = sitting(*rows)
    made.run()
    text = made.results.read_text()
    assert len(text.splitlines()) == (1 + 3) + (1 + 2)  # rounds 2 and 3 of the adapter
    made.run()
    assert made.results.read_text() == text
    assert capsys.readouterr().out.count("0 of 2 runs to do") == 1
    table = study("summary").markdown(rows, made.results)
    cells = [[c.strip() for c in line.split("|")] for line in table.splitlines()[-2:]]
    assert [c[1] for c in cells] == ["full, float32", "adapter"]
    assert float(cells[1][5]) <= float(cells[0][5])  # MB up
    runs = study("sitting").read_runs(made.results)
    first, second = (runs[row.key][-1] for row in rows)
    dense_values = sum(p.numel() for p in study("networks").mlp().parameters())
    assert first["up"] > 3 * 2 * 4 * dense_values > 20 * second["up"]
    assert "own" in first
    assert "own" in second


def test_runs_without_a_new_field_keep_their_key(study):
    plain = setting(study)
    assert plain.key == dataclasses.replace(plain, name="another").key
    assert plain.key != dataclasses.replace(plain, steps=8).key
    assert set(plain.to_json()) == {"name", "task", "rounds", "pretrained"}


@pytest.mark.parametrize("method", ["lowrank", "fedpara"])
def test_the_product_is_the_mean_of_weights(study, method):
    spec, before, replies = weights(method)
    aggregate = study("aggregation").aggregate
    state, missed = aggregate("product", spec, replies, before)
    torch.testing.assert_close(
        dense(spec, state), mean_of_weights(spec, replies), rtol=1e-5, atol=1e-5
    )
    assert missed == 0
    plain, missed = aggregate("factors", spec, replies, before)
    for name in state.keys() - {"0.weight_base"}:
        assert torch.equal(state[name], plain[name])
    gap = mean_of_weights(spec, replies) - dense(spec, plain)
    moved = mean_of_weights(spec, replies) - dense(spec, before)
    assert missed == pytest.approx(float(gap.norm() / moved.norm()), rel=1e-4)
    assert missed > 0.1


def test_the_closest_low_rank_update_is_the_truncated_svd(study):
    spec, before, replies = weights("lowrank")
    wanted = mean_of_weights(spec, replies) - before["0.weight_base"].double()
    state, missed = study("aggregation").aggregate("composed", spec, replies, before)
    left = torch.linalg.svdvals(wanted)[3:].norm()
    found = (wanted + before["0.weight_base"] - dense(spec, state)).norm()
    assert float(found) == pytest.approx(float(left), rel=0.01)
    assert missed == pytest.approx(float(left / wanted.norm()), rel=0.01)


def test_the_closest_hadamard_update_is_as_near_as_a_long_descent(study):
    spec, before, replies = weights("fedpara")
    aggregate = study("aggregation").aggregate
    _, missed = aggregate("composed", spec, replies, before)
    plain, of_mean = aggregate("factors", spec, replies, before)
    wanted = mean_of_weights(spec, replies) - before["0.weight_base"].double()
    plan, keys = spec.weights["0.weight"], spec.factor_keys("0.weight")
    leaves = {n: plain[key].double().requires_grad_() for n, key in keys.items()}
    optimizer = torch.optim.LBFGS(leaves.values(), max_iter=300, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = (plan.compose(leaves) - wanted).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    left = float(loss().detach()) ** 0.5 / float(wanted.norm())
    assert missed < of_mean
    assert missed <= 1.05 * left


def test_one_sided_training_has_an_exact_mean(study, sitting):
    row = setting(study, options={"method": "lowrank", "train": "right", **RESIDUAL})
    both = setting(study, options={"method": "lowrank", **RESIDUAL}, steps=30)
    made = sitting(row, both)
    made.run()
    runs = study("sitting").read_runs(made.results)
    assert max(line["missed"] for line in runs[row.key]) < 1e-4
    assert max(line["missed"] for line in runs[both.key]) > 1e-3


def test_a_server_that_changes_the_base_sends_it(study, sitting):
    options = {"method": "lowrank", **RESIDUAL}
    plain = setting(study, options=options, steps=30)
    product = setting(study, options={**options, "send": "all"}, aggregation="product", steps=30)
    made = sitting(plain, product)
    made.run()
    runs = study("sitting").read_runs(made.results)
    assert runs[product.key][-1]["down"] > 3 * runs[plain.key][-1]["down"]
    assert {line["missed"] for line in runs[product.key]} == {0.0}


def test_steps_are_as_many_as_asked(study):
    train = study("local").train
    model = torch.nn.Linear(2, 2)
    share = torch.randn(40, 2), torch.zeros(40, dtype=torch.long)
    assert train(model, share, rate=0.1, draw=0) == 2
    assert train(model, share, rate=0.1, draw=0, batch=16, steps=11) == 11
