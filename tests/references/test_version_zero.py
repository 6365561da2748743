"""Version 0: derived alike by both sides, checked by hash, refused where it is forged."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import subprocess
import sys
import zlib

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.codecs import encode_payload, parse_codec
from fedpara_plugins.errors import MismatchError, PayloadError
from fedpara_plugins.factors.initialise import seeded_shared
from fedpara_plugins.models.spec_rows import plan_from_row
from fedpara_plugins.references import ClientReferences, LostReferenceError, version_zero
from fedpara_plugins.references.version_zero import (
    SEEDED,
    ZEROS,
    derive_reference,
    reference_from_header,
)
from fedpara_plugins.stages.stage import MAX_TENSORS


@pytest.fixture
def model(helpers):
    return helpers.small_model()


def through_header(base, spec, limit=10**6):
    extra, described = json.loads(json.dumps([base.extra, spec.to_json()]))
    return reference_from_header(extra, described, limit=limit)


@pytest.mark.parametrize("kind", [SEEDED, ZEROS])
def test_the_header_alone_gives_the_very_state(model, helpers, kind):
    spec = fedpara.ModelSpec.of(model)
    base = derive_reference(kind, spec, model.state_dict())
    found = through_header(base, spec)
    assert found.reference == base.reference
    assert list(found.tensors) == list(model.state_dict())
    assert helpers.identical(found.tensors, base.tensors)


def test_a_model_that_starts_seeded_differs_only_where_it_is_dense(model, helpers):
    spec = fedpara.ModelSpec.of(model)
    zero = derive_reference(SEEDED, spec, model.state_dict()).tensors
    factors = {"0.x1", "0.y1", "0.x2", "0.y2"}
    for name, value in model.state_dict().items():
        if name in factors:
            assert helpers.identical({name: zero[name]}, {name: value})
            assert value.any()
        else:
            assert not zero[name].any(), name


def test_the_draw_is_the_one_that_is_described(model):
    plan = model[0].plans["weight"]
    found = seeded_shared(plan, seed=5, key="0.weight")
    step = 2.0 ** math.floor(math.log2(plan.factor_std) - 7)
    drawn = {}
    for name in ("x1", "y1", "x2", "y2"):
        digest = hashlib.sha256(f"5:0.weight.{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        drawn[name] = torch.randn(found[name].shape, generator=generator).double()
        steps = found[name].double() / step
        assert torch.equal(steps, steps.round())
        # One common gain: all ratios of found and drawn values agree, but for the rounding.
        large = drawn[name].abs() > 1
        ratios = (found[name].double() / drawn[name])[large] / plan.factor_std
        assert ratios.max() - ratios.min() < 3 * step / plan.factor_std
    x1, y1, x2, y2 = (found[name].double() for name in ("x1", "y1", "x2", "y2"))
    weight = plan.scale * (x1 @ y1.T) * (x2 @ y2.T)
    assert abs(float(weight.var()) / plan.variance - 1) < 0.01


WATCH = """
import sys, torch
import fedpara_plugins as fedpara
from fedpara_plugins.references.version_zero import derive_reference, reference_from_header
torch.set_num_threads(1)
def status(key):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(key))
net = torch.nn.Sequential(torch.nn.Linear(4096, 4096), torch.nn.Linear(4, 4))
net = fedpara.convert(net, method=sys.argv[1], gamma=0.3, init="seeded")
spec, state = fedpara.ModelSpec.of(net), fedpara.split(net).shared
size = sum(value.nbytes for value in state.values())
base, described = derive_reference("seeded", spec, state), spec.to_json()
extra = base.extra
del net, state, base
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
found = reference_from_header(extra, described, limit=size, expect=spec)
print((status("VmHWM") - before) / (3 * size + 16 * 2**20))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("method", ["fedpara", "pfedpara"])
def test_drawing_takes_three_times_the_state_at_most(method):
    result = subprocess.run(
        [sys.executable, "-c", WATCH, method],
        capture_output=True,
        # glibc would keep what was freed, and the next draw would find it for nothing.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr.decode()[-2000:]
    assert float(result.stdout) < 1


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
@pytest.mark.parametrize("tanh", [False, True])
def test_seeded_weights_have_the_target_variance(method, tanh):
    net = nn.Sequential(nn.Conv2d(32, 48, 3), nn.Linear(96, 80))
    fedpara.convert(net, method=method, gamma=0.3, tanh=tanh, init="seeded")
    for layer in net:
        plan = layer.plans["weight"]
        assert abs(float(layer.weight.detach().var()) / plan.variance - 1) < 0.05


def test_private_factors_have_no_part_in_it():
    net = fedpara.convert(nn.Sequential(nn.Linear(64, 64)), method="pfedpara", init="seeded")
    zero = derive_reference(SEEDED, fedpara.ModelSpec.of(net), fedpara.split(net).shared).tensors
    assert set(zero) == {"0.x1", "0.y1", "0.bias"}


def test_the_number_of_threads_does_not_show(model):
    plan = model[0].plans["weight"]
    threads = torch.get_num_threads()
    found = []
    for number in (1, 4):
        torch.set_num_threads(number)
        found.append(seeded_shared(plan, seed=0, key="k"))
    torch.set_num_threads(threads)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_another_seed_or_name_is_another_draw(model):
    plan = model[0].plans["weight"]
    one = seeded_shared(plan, seed=0, key="a")["x1"]
    assert not torch.equal(one, seeded_shared(plan, seed=1, key="a")["x1"])
    assert not torch.equal(one, seeded_shared(plan, seed=0, key="b")["x1"])


def test_a_zero_padding_row_stays_zero():
    net = nn.Sequential(nn.Embedding(200, 64, padding_idx=3))
    net = fedpara.convert(net, method="fedpara", init="seeded")
    assert not net[0].weight[3].any()
    assert net[0].weight[4].any()


def test_without_a_base_in_the_header_there_is_none():
    assert reference_from_header(None, None, limit=1) is None
    assert reference_from_header({"other": 1}, None, limit=1) is None


def pack(rows):
    return base64.b64encode(zlib.compress(json.dumps(rows).encode())).decode()


@pytest.mark.parametrize(
    "forged",
    [
        None,
        [],
        {},
        {"kind": "seeded"},
        {"kind": "other", "layout": pack([])},
        {"kind": "zeros", "layout": 3},
        {"kind": "zeros", "layout": "?"},
        {"kind": "zeros", "layout": base64.b64encode(b"no zlib").decode()},
        {"kind": "zeros", "layout": pack({"x": 1})},
        {"kind": "zeros", "layout": pack([["x", "F32"]])},
        {"kind": "zeros", "layout": pack([["x", "F33", [1]]])},
        {"kind": "zeros", "layout": pack([["x", "F32", [-1]]])},
        {"kind": "zeros", "layout": pack([["x", "F32", [True]]])},
        {"kind": "zeros", "layout": pack([["x", "F32", [1] * 40]])},
        {"kind": "zeros", "layout": pack([["x", "F32", [2**40, 2**40]]])},
        {"kind": "zeros", "layout": pack([["x", "F32", [10**6]]])},
        {"kind": "zeros", "layout": pack([["x", "F32", [1]], ["x", "F32", [1]]])},
        {"kind": "zeros", "layout": pack([[{}, "F32", [1]], [["x"], [], [1]]])},
        {"kind": "seeded", "layout": pack([["x", "F32", [1]]])},
    ],
)
def test_forged_descriptions_raise_nothing_but_payload_error(forged):
    with pytest.raises(PayloadError):
        reference_from_header({"base": forged}, {}, limit=10**6)


def test_a_layout_that_unpacks_to_too_much_is_refused(monkeypatch):
    monkeypatch.setattr(version_zero, "LONGEST_LAYOUT", 100)
    forged = {"kind": "zeros", "layout": pack([["x" * 200, "F32", [1]]])}
    with pytest.raises(PayloadError, match="too long"):
        reference_from_header({"base": forged}, {}, limit=10**6)


def layout_of(row):
    """The factors that such a row would have."""
    name, _, (m, n, *kernel), rank, *_ = row
    sizes = {"x": [m, rank], "y": [n, rank], **({"t": [rank, rank, *kernel]} if kernel else {})}
    prefix = name.removesuffix("weight")
    return [[f"{prefix}{x}{i}", "F32", size] for i in (1, 2) for x, size in sizes.items()]


def seeded(layout, rows, limit=10**8):
    header = {"base": {"kind": "seeded", "layout": pack(layout)}}
    return reference_from_header(header, {"seed": 0, "weights": rows}, limit=limit)


SOUND = ["weight", "fedpara", [10, 12], 3, [1.0, 1.0, 0.0, 1.0], False]


@pytest.fixture
def drawn(monkeypatch):
    """Names of the weights that were drawn."""
    names, draw = [], version_zero.seeded_shared
    monkeypatch.setattr(
        version_zero,
        "seeded_shared",
        lambda *args, key, **more: names.append(key) or draw(*args, key=key, **more),
    )
    return names


def test_the_helpers_above_describe_what_is_drawn(drawn):
    base = seeded(layout_of(SOUND), [SOUND])
    assert drawn == ["weight"]
    assert all(bool(value.any()) for value in base.tensors.values())


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (1, "unheard of"),
        (1, []),
        (2, [10]),
        (2, []),
        (2, [10, True]),
        (3, 0),
        (3, "3"),
        (4, [1.0, 0.0, 0.0, 1.0]),
        (4, [1.0, -1.0, 0.0, 1.0]),
        (4, [1e999, 1.0, 0.0, 1.0]),
        (4, [1.0, 1.0, 0.0, "x"]),
        (4, [1.0, 1.0, 0.0]),
    ],
)
def test_a_forged_model_is_refused_before_anything_is_drawn(place, value, drawn):
    with pytest.raises(PayloadError):
        seeded(layout_of(SOUND), [[*SOUND[:place], value, *SOUND[place + 1 :]]])
    with pytest.raises(PayloadError):
        seeded(layout_of(SOUND), [SOUND, SOUND])
    assert drawn == []


def test_weights_without_their_factors_in_the_layout_cost_nothing(drawn):
    """A table of 4 MiB has room for tens of thousands of them, each as large as it likes."""
    rows = [[f"{i}.weight", "fedpara", [10**6, 10**6], 10**5, *SOUND[4:]] for i in range(1000)]
    base = seeded([["w", "F32", [10]], *layout_of(SOUND)[:3]], [*rows, SOUND])
    assert drawn == []
    assert not any(bool(value.any()) for value in base.tensors.values())


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [["weight", "fedpara", [100_000, 100_000], 1, *SOUND[4:]]],
            "would take some .* ms to draw, and 83.4 ms are allowed",
        ),
        (
            [["weight", "fedpara", [4, 100, 1000, 1000], 1, *SOUND[4:]]],
            "would take some .* ms to draw",
        ),
        (
            [["weight", "fedpara", [2000, 2000], 1, SOUND[4], True, 0.5]],
            "would take some .* ms to draw",
        ),
        (
            [["weight", "lowrank", [2, 2], 2**16, *SOUND[4:]]],
            "would take some .* ms to draw",
        ),
        (
            [[f"{i}.weight", "fedpara", [4000, 4000], 1, *SOUND[4:]] for i in range(100)],
            "its 100 weights would take some .* ms to draw",
        ),
    ],
)
def test_composed_weights_that_no_such_state_has_are_refused(rows, said, drawn):
    """Factors of rank 1 are small, and what they compose can be as large as one likes."""
    with pytest.raises(PayloadError, match=said):
        seeded([entry for row in rows for entry in layout_of(row)], rows)
    assert drawn == []


def test_the_state_of_another_model_than_expected_is_not_derived(model, drawn):
    spec = fedpara.ModelSpec.of(model)
    other = fedpara.ModelSpec.of(fedpara.convert(nn.Linear(64, 32), method="fedpara", gamma=0.9))
    base = derive_reference(SEEDED, spec, model.state_dict())
    drawn.clear()
    given = {"limit": 10**8, "expect": other}
    with pytest.raises(MismatchError, match="this side"):
        reference_from_header(base.extra, spec.to_json(), **given)
    assert drawn == []
    same = reference_from_header(base.extra, spec.to_json(), limit=10**8, expect=spec)
    assert same.reference == base.reference


def test_a_layout_of_lists_without_end_is_refused_before_it_is_parsed(monkeypatch):
    text = "[" + "[]," * 10**6 + "0]"
    layout = base64.b64encode(zlib.compress(text.encode())).decode()
    monkeypatch.setattr(version_zero, "strict_json", None)
    with pytest.raises(PayloadError, match="layout of version 0 would take"):
        reference_from_header({"base": {"kind": "zeros", "layout": layout}}, None, limit=10**6)


def test_more_tensors_than_a_payload_may_have_are_refused():
    many = [[str(i), "U8", [0]] for i in range(MAX_TENSORS + 1)]
    header = {"base": {"kind": "zeros", "layout": pack(many)}}
    with pytest.raises(PayloadError, match="65537 tensors"):
        reference_from_header(header, None, limit=10**8)


HEAVY = ["weight", "fedpara", [6000, 6000], 1, *SOUND[4:]]


def test_a_model_of_this_sides_own_may_take_long_to_draw(drawn):
    """What a stranger describes may not; the client then asks for what needs no draw."""
    extra = {"base": {"kind": "seeded", "layout": pack(layout_of(HEAVY))}}
    plan = plan_from_row(HEAVY)
    spec = fedpara.ModelSpec(weights={"weight": plan}, keys=("x1", "y1", "x2", "y2"), seed=0)
    tensors = {name: torch.zeros(plan.factor_shape(name)) for name in spec.keys}
    data = encode_payload(
        tensors, codec=parse_codec("delta"), reference=tensors, model=spec.to_json(), extra=extra
    )
    given = {"limit": 10**6, "most_tensors": 10}
    for own in ((), (fedpara.ModelSpec.of(nn.Linear(2, 2)),)):
        with pytest.raises(LostReferenceError, match=r"would take some .* ms to draw"):
            ClientReferences().receive("m", data, own=own, **given)
    assert drawn == []
    with pytest.raises(LostReferenceError, match="coded against version 0"):  # zeros are not it
        ClientReferences().receive("m", data, own=(spec,), **given)
    assert drawn == ["weight"]


def test_the_size_of_a_state_is_counted_once_and_not_for_each_weight(monkeypatch):
    rows = [[f"{n}.weight", "fedpara", [2, 2], 1, *SOUND[4:]] for n in range(1000)]
    counts, size = [], version_zero.byte_size
    monkeypatch.setattr(version_zero, "byte_size", lambda *a: counts.append(1) or size(*a))
    with pytest.raises(PayloadError, match="its 1000 weights would take"):
        seeded([entry for row in rows for entry in layout_of(row)], rows)
    assert len(counts) < 10 * 4 * len(rows)
