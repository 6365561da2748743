"""Golden bytes of every stage and of both versions of headers: written once, read for ever.

`write_golden` says how the files came to be; they are never written again. What an encoder makes of
the same tensors may change, what these bytes mean may not.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from page_decoder import (
    LETTERS,
    by_the_page,
    description_by_the_page,
    reference_by_the_page,
)

from fedpara_plugins.codecs import (
    BUILTIN_STAGES,
    Description,
    HeaderForm,
    decode_payload,
    encode_payload,
    parse_codec,
    peek_header,
    reference_hash,
)
from fedpara_plugins.errors import MismatchError
from fedpara_plugins.stages.stage import STREAM_DTYPES

GOLDEN = Path(__file__).parent / "golden"
REFERENCE = "v1_reference"
NAMES = {dtype: name for name, dtype in STREAM_DTYPES.items()}


def wave(*shape, dtype=torch.float32, start=0):
    """Numbers from -2 to 2 in steps of 1/256, the same on every platform."""
    places = torch.arange(start, start + math.prod(shape))
    return (((places * 7919) % 1009 - 504).double() / 256).to(dtype).reshape(shape)


def held():
    """What both sides hold."""
    return {
        "conv.weight": wave(4, 3, 3, 3),
        "linear.weight": wave(6, 5, dtype=torch.float64),
        "half.weight": wave(5, 8, dtype=torch.float16),
        "brain.weight": wave(3, 7, dtype=torch.bfloat16),
        "a.bias": wave(6),
        "scale": torch.tensor(0.75),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 2),
    }


def sent():
    """The same after training: most values moved a little, a few far."""
    state = held()
    for place, name in enumerate(("conv.weight", "linear.weight", "half.weight", "brain.weight")):
        move = wave(*state[name].shape, dtype=state[name].dtype, start=100 * place) / 64
        move.view(-1)[3::17] *= 30
        state[name] += move
    state["a.bias"] += torch.tensor([0.5, -0.25, 0.125, 0.0, 2.0, -1.0])
    state["scale"] += 0.5
    state["steps"] += 1
    return state


def stepped():
    """The same, some whole steps of a power of two away; one tensor off any grid."""
    state = held()
    for name, step in (("conv.weight", 2.0**-7), ("linear.weight", 2.0**-3), ("half.weight", 1.0)):
        places = torch.arange(state[name].numel()).reshape(state[name].shape)
        state[name] += ((places * 31) % 7 - 3).to(state[name].dtype) * step
    state["conv.weight"][0, 0] += 300 * 2.0**-7
    state["a.bias"][0] = -0.0
    state["brain.weight"][0, 0] = float("nan")
    return state


def everything():
    """All dtypes, some of several bytes and more than one value."""
    state = {name: wave(2, 3).abs().to(dtype) for name, dtype in STREAM_DTYPES.items()}
    state["I64"] -= 2**40
    state["F32"][0] = torch.tensor([float("nan"), float("-inf"), -0.0])
    return {**state, "none": torch.empty(3, 0), "one": torch.tensor(-1, dtype=torch.int16)}


FILES = {
    "v1_quantise_ans": (sent, "delta+quantise:rms=0.05+ans"),
    "v1_rows_ans": (sent, "delta+quantise:bits=12,scope=row+ans"),
    "v1_rows_zstd": (sent, "delta+quantise:rms=0.01,scope=row+zstd"),
    "v1_blocks": (sent, "quantise:rms=0.02,scope=block,block=16"),
    "v1_topk_quantise": (sent, "delta+topk:share=0.1+quantise:bits=6+zlib"),
    "v1_topk": (sent, "delta+topk:count=3"),
    "v1_cast_fp16": (sent, "delta+cast:to=fp16+planes+zstd"),
    "v1_cast_bf16": (sent, "cast:to=bf16+zlib"),
    "v1_int8_ans": (sent, "delta+int8+ans"),
    "v1_planes_zlib": (everything, "planes+zlib"),
    "v1_planes_zstd": (everything, "planes+zstd"),
    "v1_ans": (everything, "ans"),
    "v1_grid_ans": (stepped, "grid+ans"),
    "v1_grid": (stepped, "grid"),
}
MEANT = {
    "v1_quantise_ans": "f5ae58e4519c6df8b2c2eed9a1440d718919fe9151f7e941bc9ed3856174205b",
    "v1_rows_ans": "d452bfd953a9e1d0ac5cd52bdc3080a481165b1b6f672fdce2a659db068a32b7",
    "v1_rows_zstd": "eff9f7f81b5b3350b4ce342b1ff2f85680c3b72d73d678577bba82165638a0ef",
    "v1_blocks": "f2718a95be3394ffe7faf3784184117910ea68b3306d5e3dd36a63d95ae96396",
    "v1_topk_quantise": "98844318c1aee07c7a8b2e27049a86f14782fdce6d2d39c7c1d6ca794d49f0b6",
    "v1_topk": "88293009631889ba14c554b2dcfd4ddfdfc52c24ceb044fe2f449743ce79e6e9",
    "v1_cast_fp16": "75fd2fbc25175a7034394c40c69d38ce55ecfa85215800e939353c8e97e6b3f4",
    "v1_cast_bf16": "9b0fa1134f1fae946ffaee08fdc937c2493f9bf7c57045c152eb0dbe4b051d14",
    "v1_int8_ans": "6eb3ee20ad79dcffec0637a9069f58932b3146f7f1dc8dd88453d97fd14b0ca7",
    "v1_planes_zlib": "b748fabf9b574789f56ed63eb243d97cd6386a28a7f380481ac42f31e124db1b",
    "v1_planes_zstd": "b748fabf9b574789f56ed63eb243d97cd6386a28a7f380481ac42f31e124db1b",
    "v1_ans": "b748fabf9b574789f56ed63eb243d97cd6386a28a7f380481ac42f31e124db1b",
    "v1_grid_ans": "a12b39eb1b49215409e8574edc88dbc3b0e30736814382e47413e7da403aca88",
    "v1_grid": "a12b39eb1b49215409e8574edc88dbc3b0e30736814382e47413e7da403aca88",
}
"""The `reference_hash` of what each file decodes to."""


COMPACT = {
    "v2_whole_ans": (sent, "delta+quantise:rms=0.05+ans", False),
    "v2_quantise_ans": (sent, "delta+quantise:rms=0.05+ans", True),
    "v2_rows_zstd": (sent, "delta+quantise:rms=0.01,scope=row+zstd", True),
    "v2_planes_zlib": (sent, "planes+zlib", True),
    "v2_int8": (sent, "delta+int8", True),
    "v2_grid_ans": (stepped, "grid+ans", True),
}
COMPACT_MEANT = {
    "v2_whole_ans": "f5ae58e4519c6df8b2c2eed9a1440d718919fe9151f7e941bc9ed3856174205b",
    "v2_quantise_ans": "f5ae58e4519c6df8b2c2eed9a1440d718919fe9151f7e941bc9ed3856174205b",
    "v2_rows_zstd": "eff9f7f81b5b3350b4ce342b1ff2f85680c3b72d73d678577bba82165638a0ef",
    "v2_planes_zlib": "d6436afb177306b8ed3ee59021cb083a8b527397cb69dacd9b044abc05a20fa3",
    "v2_int8": "6eb3ee20ad79dcffec0637a9069f58932b3146f7f1dc8dd88453d97fd14b0ca7",
    "v2_grid_ans": "a12b39eb1b49215409e8574edc88dbc3b0e30736814382e47413e7da403aca88",
}
MODEL = {"seed": 3, "weights": [["conv.weight", "fedpara", [4, 27], 2, [0.5, 1e-05], 0.0]]}
DESCRIPTION = "32f7e4958472f3c7560b7f2dfb27a5b5"
"""The hash of the description of `MODEL` and `held`."""


def write_compact_golden():
    """How the files of version 2 came to be."""
    known = held()
    for name, (state, codec, described) in COMPACT.items():
        form = HeaderForm(Description.of(MODEL, known) if described else None)
        data = encode_payload(
            state(), codec=parse_codec(codec), reference=known, model=MODEL, form=form
        )
        (GOLDEN / f"{name}.fpp2").write_bytes(data)


def write_golden():
    """How the files came to be."""
    known = held()
    files = {REFERENCE: encode_payload(known, codec=parse_codec("none"))}
    for name, (state, codec) in FILES.items():
        files[name] = encode_payload(state(), codec=parse_codec(codec), reference=known)
    for name, data in files.items():
        (GOLDEN / f"{name}.safetensors").write_bytes(data)


def read(name):
    return (GOLDEN / f"{name}.safetensors").read_bytes()


def decoded(name):
    reference = decode_payload(read(REFERENCE), limit=10**5).tensors
    return decode_payload(read(name), reference=reference, limit=10**5).tensors


def values_of(tensor):
    flat = tensor.reshape(-1)
    if NAMES[tensor.dtype] not in (*LETTERS, "BF16"):
        flat = flat.view(torch.uint8)
    return flat.tolist()


@pytest.mark.parametrize("name", FILES)
def test_golden_bytes_mean_what_they_meant(name):
    header = peek_header(read(name))
    stages = [item.partition(":")[0] for item in FILES[name][1].split("+")]
    assert (header.version, header.codec.split("+")) == (1, stages)
    assert reference_hash(decoded(name)) == MEANT[name]


@pytest.mark.parametrize("name", FILES)
def test_the_page_is_enough_to_decode_golden_bytes(name):
    found = by_the_page(read(name), by_the_page(read(REFERENCE)))
    ours = decoded(name)
    assert list(found) == list(ours)
    for key, (kind, shape, values) in found.items():
        assert (kind, tuple(shape)) == (NAMES[ours[key].dtype], ours[key].shape), key
        assert repr(values) == repr(values_of(ours[key])), key  # NaN and -0.0 included


@pytest.mark.parametrize("name", [name for name, (_, codec) in FILES.items() if "grid" in codec])
def test_golden_bytes_of_exact_stages_give_back_what_was_sent(name):
    assert reference_hash(decoded(name)) == reference_hash(stepped())


@pytest.mark.parametrize("name", ["v1_planes_zlib", "v1_planes_zstd", "v1_ans"])
def test_golden_bytes_of_every_dtype_give_back_what_was_sent(name):
    assert reference_hash(decoded(name)) == reference_hash(everything())


@pytest.mark.parametrize("name", [name for name, (state, _) in FILES.items() if state == sent])
def test_golden_bytes_of_lossy_stages_are_near_what_was_sent(name):
    back = decoded(name)
    for key, tensor in sent().items():
        wrong = (back[key].double() - tensor.double()).norm()
        assert wrong <= 0.3 * tensor.double().norm(), key


def test_the_hash_of_the_reference_is_the_pages():
    digest = reference_by_the_page(read(REFERENCE))
    assert reference_hash(decode_payload(read(REFERENCE), limit=10**5).tensors) == digest
    named = {peek_header(read(name)).reference for name in FILES}
    assert named == {digest, None}


def test_golden_bytes_against_another_reference_are_refused():
    other = held() | {"steps": torch.tensor(8)}
    with pytest.raises(MismatchError, match="payload coded against reference"):
        decode_payload(read("v1_grid"), reference=other, limit=10**5)


def test_every_stage_has_golden_bytes():
    seen = {stage for name in FILES for stage in peek_header(read(name)).codec.split("+")}
    assert seen == {stage.name for stage in BUILTIN_STAGES}


def test_golden_bytes_hold_escapes_wide_symbols_rows_and_blocks():
    """So that no branch of a decoder is left without them."""
    notes = {name: peek_header(read(name)).notes for name in FILES}
    quantised = [note for some in notes.values() for note in some if "scopes" in note]
    assert set("".join(note["scopes"] for note in quantised)) == set("trb")
    assert any(note["far"] for note in quantised)
    kinds = {kind for some in notes.values() for kind in some[-1].get("dtypes", [])}
    assert {"I8", "I16", "F64", "C128"} <= kinds


def compact(name):
    return (GOLDEN / f"{name}.fpp2").read_bytes()


@pytest.mark.parametrize("name", COMPACT)
def test_golden_bytes_of_version_2_mean_what_they_meant(name):
    known = Description.of(MODEL, held())
    assert known.digest == DESCRIPTION
    back = decode_payload(
        compact(name), reference=held(), limit=10**5, descriptions={DESCRIPTION: known}
    )
    stages = [item.partition(":")[0] for item in COMPACT[name][1].split("+")]
    assert (back.header.version, back.header.codec.split("+")) == (2, stages)
    assert back.header.model == MODEL
    assert back.header.description == (DESCRIPTION if COMPACT[name][2] else "0" * 32)
    assert reference_hash(back.tensors) == COMPACT_MEANT[name]


@pytest.mark.parametrize("name", COMPACT)
def test_the_page_is_enough_to_decode_golden_bytes_of_version_2(name):
    reference = by_the_page(read(REFERENCE))
    digest, text = description_by_the_page(MODEL, reference)
    assert digest.hex() == DESCRIPTION
    found = by_the_page(compact(name), reference, {digest: text})
    known = {DESCRIPTION: Description.of(MODEL, held())}
    ours = decode_payload(compact(name), reference=held(), limit=10**5, descriptions=known).tensors
    assert list(found) == list(ours)
    for key, (kind, shape, values) in found.items():
        assert (kind, tuple(shape)) == (NAMES[ours[key].dtype], ours[key].shape), key
        assert repr(values) == repr(values_of(ours[key])), key
