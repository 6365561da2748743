"""``fedpara inspect`` shows what a file holds, and damaged or hostile ones end in one line."""

import contextlib
import json
import re
import struct
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import FedParaError, PayloadError
from fedpara_plugins.cli.export import dense_from
from fedpara_plugins.cli.inspect_file import inspect_file
from fedpara_plugins.codecs import encode_payload, parse_codec, reference_hash
from fedpara_plugins.models.checkpoint_files import METADATA_KEY, read_about, read_checkpoint
from fedpara_plugins.models.checkpoints import save_dense, save_factors
from fedpara_plugins.text import printable


def model(method="fedpara"):
    torch.manual_seed(0)
    return fedpara.convert(
        nn.Sequential(nn.Linear(64, 48), nn.BatchNorm1d(48)), method=method, gamma=0.3
    )


def payload(codec, method="fedpara", **extra):
    spec = fedpara.ModelSpec.of(model(method))
    reference = fedpara.split(model(method)).shared
    tensors = {
        name: value + 0.01 if value.is_floating_point() else value + 1
        for name, value in reference.items()
    }
    data = encode_payload(
        tensors, codec=parse_codec(codec), reference=reference, model=spec.to_json(), **extra
    )
    return data, reference


def rows(out):
    """Name: (dtype, shape, bytes) of the table of tensors."""
    table = out.partition("  tensor ")[2].splitlines()[1:-1]
    return {line.split()[0]: tuple(line.split()[1:]) for line in table}


# Payloads


@pytest.mark.parametrize("codec", ["none", "lossless", "delta", "int8", "delta+zlib"])
@pytest.mark.parametrize("method", ["fedpara", "pfedpara"])
def test_payloads(command, codec, method):
    data, reference = payload(codec, method, extra={"client": 3})
    Path("message").write_bytes(data)
    code, out, err = command("inspect", "message")
    assert (code, err) == (0, "")
    assert f"message: payload of format version 1, {len(data):,} bytes" in out
    size = sum(value.numel() * value.element_size() for value in reference.values())
    assert f"codec: {parse_codec(codec).resolved(None).name}, for tensors of {size:,} bytes" in out
    needs = parse_codec(codec).needs_reference
    assert f"reference: {reference_hash(reference) if needs else 'none'}" in out
    assert "extra: {'client': 3}" in out
    spec = fedpara.ModelSpec.of(model(method))
    assert f"fingerprint {spec.fingerprint}" in out
    assert f"0.weight: 48x64, {method} rank {spec.weights['0.weight'].rank}, scale" in out
    assert rows(out) == {
        name: (
            "I64" if value.dtype == torch.int64 else "F32",
            "x".join(map(str, value.shape)) or "scalar",
            f"{value.numel() * value.element_size():,}",
        )
        for name, value in reference.items()
    }


def test_a_payload_of_a_dense_model_describes_none(command):
    data = encode_payload({"w": torch.ones(3)}, codec=parse_codec("lossless"))
    Path("message").write_bytes(data)
    code, out, _ = command("inspect", "message")
    assert code == 0
    assert "model: not described" in out
    assert rows(out) == {"w": ("F32", "3", "12")}


def test_damaged_payloads(refused):
    data, _ = payload("int8")
    for place in (len(data) // 3, len(data) // 2, len(data) - 1):
        changed = bytearray(data)
        changed[place] ^= 1
        Path("message").write_bytes(changed)
        refused("inspect", "message", code=1)
    for length in (10, len(data) // 2, len(data) - 1):
        Path("message").write_bytes(data[:length])
        refused("inspect", "message", code=1)


def test_a_decompression_bomb_is_not_opened(refused):
    data = encode_payload({"w": torch.zeros(10**7)}, codec=parse_codec("lossless"))
    assert len(data) < 10**5
    Path("message").write_bytes(data)
    assert "limit" in refused("inspect", "message", code=1)


# Checkpoints


def test_factor_checkpoints(command):
    save_factors(model("pfedpara"), "f.safetensors")
    code, out, err = command("inspect", "f.safetensors")
    assert (code, err) == (0, "")
    assert re.search(r"^f.safetensors: factor checkpoint, [\d.]+ kB$", out, re.M)
    assert "method: pfedpara" in out
    assert "'gamma': 0.3" in out
    assert "0.weight: 48x64, pfedpara rank" in out
    assert "private factors: 2 of 2 in the file" in out
    assert set(rows(out)) == set(model("pfedpara").state_dict())
    rank = model("pfedpara")[0].plans["weight"].rank
    assert rows(out)["0.x1"] == ("F32", f"48x{rank}", f"{4 * 48 * rank:,}")
    save_factors(model("pfedpara"), "s.safetensors", private=False)
    assert "private factors: 0 of 2 in the file" in command("inspect", "s.safetensors")[1]


def test_dense_and_foreign_checkpoints(command):
    state = {"w": torch.ones(2, 3, dtype=torch.bfloat16), "n": torch.tensor(3)}
    save_dense("d.safetensors", state, model="the server's model", method="lowrank")
    code, out, _ = command("inspect", "d.safetensors")
    assert code == 0
    assert "d.safetensors: dense checkpoint" in out
    assert "model: the server's model" in out
    assert rows(out) == {"w": ("BF16", "2x3", "12"), "n": ("I64", "scalar", "8")}
    save_file(state, "x.safetensors")
    assert "without a fedpara description" in command("inspect", "x.safetensors")[1]


def test_control_characters_do_not_reach_the_terminal(command):
    save_dense("d.safetensors", {"a\x1b[2Jb": torch.ones(1)}, model="\x1b]0;x\x07", method="m")
    code, out, _ = command("inspect", "d.safetensors")
    assert code == 0
    assert "\x1b" not in out
    assert "\x07" not in out
    assert r"a\x1b[2Jb" in out
    assert printable("é 日\u202e") == "é 日\\u202e"


# Ledgers


def entry(**changes):
    values = {"round": 1, "kind": "train", "direction": "up", "client": "7", "tensors": 4,
              "raw_bytes": 4000, "encoded_bytes": 1000, "dense_bytes": 20000}  # fmt: skip
    return fedpara.LedgerEntry(**{**values, **changes})


def test_ledgers(command):
    ledger = fedpara.Ledger("run.jsonl")
    for changes in ({}, {"client": "8"}, {"direction": "down"}, {"round": 2, "encoded_bytes": 500}):
        ledger.record(entry(**changes))
    code, out, err = command("inspect", "run.jsonl")
    assert (code, err) == (0, "")
    assert "run.jsonl: ledger of 4 messages, 2 rounds, 2 clients" in out
    lines = [line.split() for line in out.splitlines()[2:]]
    assert [line[:6] for line in lines] == [
        ["1", "down", "1", "1,000", "4,000", "20,000"],
        ["1", "up", "2", "2,000", "8,000", "40,000"],
        ["2", "up", "1", "500", "4,000", "20,000"],
        ["all", "down", "1", "1,000", "4,000", "20,000"],
        ["all", "up", "3", "2,500", "12,000", "60,000"],
    ]
    assert "(24.0 times fewer than dense)" in out


def test_a_torn_last_line_is_what_a_killed_run_leaves(command):
    text = json.dumps(asdict(entry())) + "\n"
    Path("run.jsonl").write_text(text + text[:40])
    assert "ledger of 1 messages" in command("inspect", "run.jsonl")[1]


# Files that are none, or want to be something else


def container(table, body=b""):
    data = json.dumps(table).encode() if not isinstance(table, bytes) else table
    return struct.pack("<Q", len(data)) + data + body


FACTORS = {"format": "factors"}
HOSTILE = {
    "empty": b"",
    "text": b"hello world, this is a text",
    "random": bytes(range(255, 100, -1)),
    "zip": b"PK\x03\x04" + bytes(40),
    "pickle": b"\x80\x02}q\x00.",
    "json of another kind": b'{"a": 1}\n',
    "json list after a brace": b"{[1]\n",
    "deep json": b'{"a":' * 100_000 + b"\n",
    "huge number": b'{"round":' + b"9" * 5000 + b"}\n",
    "huge header": struct.pack("<Q", 2**60) + b"{}" + bytes(20),
    "header beyond the file": struct.pack("<Q", 500) + b"{}" + bytes(20),
    "header no json": container(b"{ not json }"),
    "offsets outside": container({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}),
    "absurd shape": container({"w": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}),
    "unknown dtype": container({"w": {"dtype": "F9", "shape": [1], "data_offsets": [0, 1]}}, b"a"),
    "description a number": save({}, {METADATA_KEY: "7"}),
    "description no json": save({}, {METADATA_KEY: "{"}),
    "description deep": save({}, {METADATA_KEY: "[" * 100_000}),
    "description empty": save({}, {METADATA_KEY: json.dumps(FACTORS)}),
    "keys a number": save({}, {METADATA_KEY: json.dumps({**FACTORS, "keys": 3, "model": {}})}),
    "model a list": save({}, {METADATA_KEY: json.dumps({**FACTORS, "keys": [], "model": []})}),
    "seed endless": save(
        {}, {METADATA_KEY: '{"format":"factors","keys":[],"model":'
                           '{"seed":1e999,"private":[],"weights":[]}}'}
    ),
    "pretends to be a payload": save({}, {METADATA_KEY: '{"crc32":"00000000"}'}),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(refused, name):
    Path("file").write_bytes(HOSTILE[name])
    error = refused("inspect", "file", code=1)
    assert len(error) < 1000
    assert error.startswith("fedpara: error: file")


def test_every_part_of_a_description_may_be_anything(tmp_path):
    """Each value of the description replaced by odd ones: an answer or a PayloadError, no crash."""
    path = tmp_path / "f.safetensors"
    save_factors(model("pfedpara"), path)
    about, tensors = read_about(path), model("pfedpara").state_dict()
    outcomes = set()
    for change in _changed(about):
        save_file(tensors, path, metadata={METADATA_KEY: json.dumps(change)})
        try:
            inspect_file(path)
            outcomes.add("shown")
        except PayloadError:
            outcomes.add("refused")
        with contextlib.suppress(FedParaError):
            dense_from(read_checkpoint(path))
    assert outcomes == {"shown", "refused"}


def _changed(value):
    """Copies of a JSON value with one part replaced, at any depth."""
    yield from (None, -1, 10**30, 1e308, "x", [], {}, [[]])
    if not isinstance(value, dict | list):
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        for other in _changed(part):
            copy = value.copy()
            copy[key] = other
            yield copy


def test_files_that_cannot_be_read(refused, folder):
    assert "nowhere" in refused("inspect", "nowhere")
    (folder / "sub").mkdir()
    assert "sub" in refused("inspect", "sub")
    assert "FILE" in refused("inspect")


def test_errors_in_code_are_the_project_s_own(tmp_path):
    (tmp_path / "x").write_bytes(b"{}\n")
    with pytest.raises(FedParaError):
        inspect_file(tmp_path / "x")


def test_texts_of_a_stranger_stay_short_lines(command):
    """A name of a megabyte would otherwise widen every row of the table."""
    name = "long\x1b[2J\n" + "n" * 10**6
    tensors = {name: torch.ones(2), **{str(i): torch.ones(1) for i in range(50)}}
    data = encode_payload(tensors, codec=parse_codec("none"), extra={"x": "\n" + "y" * 10**6})
    Path("message").write_bytes(data)
    code, out, _ = command("inspect", "message")
    assert code == 0
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) < 500
    assert len(out) < 50_000
    save_file(tensors, "states.safetensors", metadata={METADATA_KEY: json.dumps({"model": name})})
    code, out, _ = command("inspect", "states.safetensors")
    assert code == 0
    assert max(map(len, out.splitlines())) < 500


def test_a_description_of_a_million_lists_is_not_read(refused):
    about = '{"format":"factors","x":[' + "[]," * 10**6 + "0]}"
    save_file({"w": torch.ones(2)}, "states.safetensors", metadata={METADATA_KEY: about})
    assert "not a JSON object" in refused("inspect", "states.safetensors", code=1)
