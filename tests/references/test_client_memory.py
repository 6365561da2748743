"""A client loads the state that a message names, and not all that it holds."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch

from fedpara_plugins import ModelSpec
from fedpara_plugins.codecs import encode_payload, parse_codec, reference_hash
from fedpara_plugins.references import ClientReferences, DecodedDownlink, client


class Counted(dict):
    """A state that knows how many of them are alive."""

    alive = most = 0

    def __init__(self, tensors):
        super().__init__(tensors)
        Counted.alive += 1
        Counted.most = max(Counted.most, Counted.alive)

    def __del__(self):
        Counted.alive -= 1


def test_one_state_is_in_memory_at_a_time(monkeypatch):
    spec = ModelSpec(weights={}, keys=("w",), seed=0)
    held = ClientReferences()
    states = [{"w": torch.full((9,), float(number))} for number in range(2)]
    against = None
    for state in states:
        data = encode_payload(
            state, codec=parse_codec("delta"), reference=against, model=spec.to_json()
        )
        found = held.receive("m", data, limit=1000)
        held.keep("m", DecodedDownlink(state, reference_hash(state), found.header))
        against = state
    assert held.holds("m") == tuple(map(reference_hash, reversed(states)))
    load = ClientReferences._state
    monkeypatch.setattr(client.ClientReferences, "_state", lambda *args: Counted(load(*args)))
    gc.collect()
    for state in states:
        data = encode_payload(state, codec=parse_codec("delta"), reference=state)
        assert torch.equal(held.receive("m", data, limit=1000).tensors["w"], state["w"])
    assert Counted.most == 1


WATCH = """
import base64, json, sys, zlib
import torch
torch.set_num_threads(1)
from fedpara_plugins import ModelSpec
from fedpara_plugins.codecs import encode_payload, parse_codec, reference_hash
from fedpara_plugins.errors import PayloadError
from fedpara_plugins.exchange.budget import MessageBudget
from fedpara_plugins.references import ClientReferences, version_zero
from fedpara_plugins.stages.dtypes import dtype_name
def status(key):
    return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(key))
def watched(name, client, payload, model, honest):
    budget = MessageBudget(model)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    try:
        client.receive("m", payload, limit=budget.left, working=budget.working)
        outcome = "decoded"
    except PayloadError as error:
        outcome = "refused"
    took = status("VmHWM") - before
    assert outcome == "decoded" or not honest, name
    print(took / (3 * model + 2**24), outcome, name)
spec = ModelSpec(weights={}, keys=("w",), seed=0)
def held(state):
    client = ClientReferences()
    first = encode_payload(state, codec=parse_codec("none"), model=spec.to_json())
    client.keep("m", client.receive("m", first, limit=2**40))
    return client
count = 2**22
for dtype in (torch.float16, torch.float32):
    state = {"w": (torch.arange(count).reshape(2, -1) % 64 / 64).to(dtype)}
    client = held(state)
    for codec in ("small", "balanced", "int8", "grid+zlib", "delta+planes+zlib", "delta+cast"):
        moved = {"w": state["w"] + 0.25}
        data = encode_payload(moved, codec=parse_codec(codec), reference=state)
        del moved
        watched(f"{codec} {dtype}", client, data, state["w"].nbytes, True)
    if dtype == torch.float16:  # wide symbols for narrow values
        wide = torch.ones(2, count // 2, dtype=torch.int32)
        note = {"dtypes": ["F16"], "each": "0", "exponents": [-5]}
        from fedpara_plugins.stages.grid import GridStage
        class Wide(GridStage):
            def encode(self, tensors, *, reference):
                return {"w": wide}, note
        from dataclasses import replace
        codec = parse_codec("grid+zlib")
        codec = type(codec)((Wide(), *codec.stages[1:]))
        data = encode_payload(state, codec=codec, reference=state)
        watched("wide symbols", client, data, state["w"].nbytes, False)
del state, client
def seeded(row, extra=()):
    name, method, (m, n, *kernel), rank, *_ = row
    sizes = {"x": [m, rank], "y": [n, rank], **({"t": [rank, rank, *kernel]} if kernel else {})}
    layout = [[f"{x}{i}", "F32", size] for i in (1, 2)[:1 + (method == "fedpara")]
              for x, size in sizes.items()] + list(extra)
    text = base64.b64encode(zlib.compress(json.dumps(layout).encode())).decode()
    return layout, {"base": {"kind": "seeded", "layout": text}}
row_end = [[1.0, 1.0, 0.0, 1.0], False]
for name, row, model in [
    ("version 0 of twice the model", ["weight", "fedpara", [64, 32704], 64, *row_end], 2**23),
    ("a core", ["weight", "fedpara", [8, 8, 8, 8], 150, *row_end], 2**23),
    ("one core", ["weight", "lowrank", [8, 8, 8, 8], 150, *row_end], 2**23),
    ("a start", ["weight", "fedpara", [700, 700], 1000, [1.0, .1, 0.0, .1], True, .5], 2**23),
    ("the very model", ["weight", "fedpara", [256, 7936], 128, *row_end], 2**23),
    ("a kernel of many places", ["weight", "fedpara", [2, 64, 512, 500], 1, *row_end], 2**10),
]:
    layout, extra = seeded(row)
    zeros = {k: torch.zeros(shape) for k, _, shape in layout}
    derived = version_zero.reference_from_header(
        extra, {"seed": 0, "weights": [row]}, limit=2**40, working=2**40,
        expect=type("Any", (), {"check_described": lambda *a, **k: None})(),
    )
    data = encode_payload(
        derived.tensors, codec=parse_codec("delta+quantise:rms=2+zlib"),
        reference=derived.tensors, model={"seed": 0, "weights": [row]}, extra=extra,
    )
    del derived, zeros
    watched(name, ClientReferences(), data, model, name == "the very model")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_message_takes_three_times_the_model_at_most_with_its_reference():
    result = subprocess.run(
        [sys.executable, "-c", WATCH],
        capture_output=True,
        text=True,
        # glibc would keep what was freed, and the next message would find it for nothing.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 19
    assert [line for line in lines if float(line.split()[0]) >= 1] == []
