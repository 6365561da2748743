"""Factor checkpoints and ``fedpara export``: the dense model comes out, or a line that says why."""

import json
import os
import pickle
import runpy
from hashlib import sha256
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins import MismatchError, PayloadError
from fedpara_plugins.codecs import encode_payload, parse_codec
from fedpara_plugins.models.checkpoint_files import METADATA_KEY, read_about, read_checkpoint
from fedpara_plugins.models.checkpoints import load_factors, save_dense, save_factors
from fedpara_plugins.models.spec_rows import plan_from_row

USER_MODELS = runpy.run_path(str(Path(__file__).with_name("user_models.py")))
Net = USER_MODELS["Net"]


def scattered(model):
    """No value stays at zero or one, where an error could hide."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) * parameter.std().clamp_min(0.1))
    return model


def trained(method="fedpara", gamma=0.3, build=Net, **options):
    return scattered(fedpara.convert(build(), method=method, gamma=gamma, **options))


def assert_exported(path, model):
    """The unmodified class loads the file strictly and computes what the factors compute."""
    plain = Net()
    plain.load_state_dict(load_file(path), strict=True)
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(plain.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-4)


# A file that describes itself


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
@pytest.mark.parametrize("options", [{}, {"tanh": True}, {"overrides": "head: gamma=0.6"}])
def test_export_needs_no_flags_and_no_model(command, method, options):
    model = trained(method, **options)
    save_factors(model, "factors.safetensors")
    code, out, err = command("export", "factors.safetensors", "-o", "new/dense.safetensors")
    assert (code, err) == (0, "")
    assert "tensors" in out
    assert_exported("new/dense.safetensors", model)
    about = read_about("new/dense.safetensors")
    assert about == {
        "format": "dense",
        "model": "the exported model",
        "method": method,
        "version": fedpara.__version__,
    }
    assert sorted(os.listdir("new")) == ["dense.safetensors"]


def test_with_the_right_model_the_result_is_the_same(command):
    model = trained()
    save_factors(model, "f.safetensors")
    assert command("export", "f.safetensors", "-o", "a.safetensors")[0] == 0
    words = ["--model", "user_models:Net"]
    assert command("export", "f.safetensors", *words, "-o", "b.safetensors")[0] == 0
    words += ["--gamma", "0.3"]
    assert command("export", "f.safetensors", *words, "-o", "c.safetensors")[0] == 0
    a, b, c = (load_file(f"{name}.safetensors") for name in "abc")
    for name, value in a.items():
        assert torch.equal(value, b[name])
        torch.testing.assert_close(value, c[name])


def test_shared_factors_alone_give_w1_and_it_is_said(command):
    model = trained("pfedpara")
    save_factors(model, "f.safetensors", private=False)
    private = fedpara.split(model).private
    assert private
    assert private.keys().isdisjoint(load_file("f.safetensors"))
    code, out, _ = command("export", "f.safetensors", "-o", "d.safetensors")
    assert code == 0
    assert "W1" in out
    assert "W1" in read_about("d.safetensors")["model"]
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name in private:
                value.zero_()
    assert_exported("d.safetensors", model)


def test_tied_weights_buffers_and_half_precision_come_through(command):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
            self.first, self.last = nn.Linear(8, 64), nn.Linear(8, 64)
            self.last.weight = self.first.weight

    model = scattered(fedpara.convert(Tied().bfloat16(), gamma=0.3))
    model.layers[1].num_batches_tracked += 41
    save_factors(model, "f.safetensors")
    assert command("export", "f.safetensors", "-o", "d.safetensors")[0] == 0
    plain = Tied().bfloat16()
    plain.load_state_dict(load_file("d.safetensors"), strict=True)
    expected = fedpara.to_dense(model).state_dict()
    assert list(expected) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("first", [(), ("--gamma", "0.3")], ids=["plain", "with options"])
def test_the_wrong_model_is_refused_by_layer_and_both_shapes(refused, first):
    save_factors(trained(), "f.safetensors")
    error = refused(
        "export", "f.safetensors", "--model", "user_models:Wider", *first, "-o", "d", code=1
    )
    assert "head" in error
    assert "(20, 1024)" in error
    assert "(30, 1024)" in error
    assert not os.path.exists("d")


@pytest.mark.parametrize(
    ("words", "here", "there"),
    [
        (["--gamma", "0.5"], "rank 13", "rank 17"),
        (["--method", "lowrank", "--gamma", "0.3"], "fedpara rank 13", "lowrank rank"),
    ],
)
def test_options_that_contradict_the_file_are_refused(refused, words, here, there):
    model = trained()
    ranks = [model.body[0].plans["weight"].rank]
    ranks.append(fedpara.convert(Net(), gamma=0.5).body[0].plans["weight"].rank)
    here, there = here.replace("13", str(ranks[0])), there.replace("17", str(ranks[1]))
    save_factors(model, "f.safetensors")
    words = ["--model", "user_models:Net", *words]
    error = refused("export", "f.safetensors", *words, "-o", "d", code=1)
    assert "body.0.weight" in error
    assert here in error
    assert there in error


# Files that say nothing of themselves


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
def test_a_bare_state_dict_needs_model_and_options(command, refused, method, ending):
    model = trained(method)
    state = model.state_dict()
    torch.save(state, "f.pt") if ending == "pt" else save_file(dict(state), f"f.{ending}")
    error = refused("export", f"f.{ending}", "-o", "d.safetensors")
    assert "does not describe its model" in error
    assert "holds factors of 2 layers ('body.0', for example)" in error
    assert "fedpara.to_dense(state)" in error
    error = refused("export", f"f.{ending}", "--model", "user_models:Net", "-o", "d.safetensors")
    assert "method and gamma" in error
    words = ["--model", "user_models:Net", "--method", method, "--gamma", "0.3"]
    assert command("export", f"f.{ending}", *words, "-o", "d.safetensors")[0] == 0
    assert_exported("d.safetensors", model)


def test_a_dense_state_dict_is_told_from_factors(refused):
    torch.save(Net().state_dict(), "f.pt")
    assert "may be dense already" in refused("export", "f.pt", "-o", "d.safetensors")


def test_the_first_layer_that_differs_is_named_with_both_shapes(refused):
    model = trained()
    torch.save(model.state_dict(), "f.pt")
    other = fedpara.convert(Net(), gamma=0.5)
    words = ["--model", "user_models:Net", "--gamma", "0.5", "-o", "d"]
    error = refused("export", "f.pt", *words, code=1)
    assert "layer 'body.0' differs: x1" in error
    assert str(tuple(model.body[0].x1.shape)) in error
    assert str(tuple(other.body[0].x1.shape)) in error
    words = ["--model", "user_models:Net", "--method", "lowrank", "--gamma", "0.3", "-o", "d"]
    assert "layer 'body.0'" in refused("export", "f.pt", *words, code=1)


def test_names_on_one_side_only(refused):
    state = trained().state_dict()
    words = ["--model", "user_models:Net", "--gamma", "0.3", "-o", "d"]
    torch.save({name: value for name, value in state.items() if name != "head.y2"}, "less.pt")
    assert "y2 is missing in the file" in refused("export", "less.pt", *words, code=1)
    torch.save({**state, "nose.weight": torch.ones(2)}, "more.pt")
    error = refused("export", "more.pt", *words, code=1)
    assert "'nose' differs" in error
    assert "missing in the converted model" in error


def test_private_factors_come_all_or_none(refused):
    state = trained("pfedpara").state_dict()
    del state["head.x2"]
    torch.save(state, "f.pt")
    words = ["--model", "user_models:Net", "--method", "pfedpara", "--gamma", "0.3", "-o", "d"]
    assert "x2 is missing" in refused("export", "f.pt", *words, code=1)


class Evil:
    def __reduce__(self):
        return (open, ("owned", "w"))


def test_pickles_are_not_run(refused):
    with open("f.pt", "wb") as file:
        pickle.dump({"weight": Evil()}, file)
    torch.save({"weight": Evil()}, "g.pt")
    for name in ("f.pt", "g.pt"):
        assert "weights_only=True" in refused("export", name, "-o", "d", code=1)
    assert not os.path.exists("owned")


def test_files_that_are_no_checkpoint(refused):
    torch.save({"epoch": 3, "model": trained().state_dict()}, "whole.pt")
    error = refused("export", "whole.pt", "-o", "d", code=1)
    assert "'epoch', 'model'" in error
    save_dense("dense.safetensors", Net().state_dict(), model="x", method="fedpara")
    assert "dense model already" in refused("export", "dense.safetensors", "-o", "d", code=1)
    data = encode_payload(trained().state_dict(), codec=parse_codec("none"))
    with open("message", "wb") as file:
        file.write(data)
    assert "inspect" in refused("export", "message", "-o", "d", code=1)
    assert "nowhere.pt" in refused("export", "nowhere.pt", "-o", "d")
    assert "-o" in refused("export", "dense.safetensors")


def test_nan_is_not_exported(refused):
    model = trained()
    with torch.no_grad():
        model.head.x1[0, 0] = float("nan")
    save_factors(model, "f.safetensors")
    error = refused("export", "f.safetensors", "-o", "d", code=1)
    assert "head.weight" in error
    assert "NaN" in error


# Damaged and hostile files


def test_small_factors_of_a_weight_without_bound_are_refused(refused):
    """Two columns of a million entries compose to 4 TB, which no size of the file tells."""
    count = 10**6
    row = ["weight", "lowrank", [count, count], 1, [1.0, 0.1, 0.0, 0.1], False]
    spec = fedpara.ModelSpec(weights={"weight": plan_from_row(row)}, keys=("x1", "y1"), seed=0)
    about = {"format": "factors", "version": "0", "method": "lowrank", "config": {}}
    about |= {"model": spec.to_json(), "keys": ["x1", "y1"]}
    factors = {"x1": torch.ones(count, 1), "y1": torch.ones(count, 1)}
    save_file(factors, "f.safetensors", metadata={METADATA_KEY: json.dumps(about)})
    assert "would take 4,000 GB" in refused("export", "f.safetensors", "-o", "d", code=1)


def rewritten(path, change):
    """The same tensors with another description, whose fingerprint is right wherever it can be."""
    about = read_about(path)
    change(about)
    model = about["model"]
    if isinstance(model, dict) and isinstance(about.get("keys"), list):
        content = [model["seed"], about["keys"], model["weights"]]
        model["fingerprint"] = sha256(json.dumps(content).encode()).hexdigest()[:16]
    save_file(load_file(path), path, metadata={METADATA_KEY: json.dumps(about)})


@pytest.mark.parametrize(
    "change",
    [
        lambda about: about.pop("keys"),
        lambda about: about.update(keys=7),
        lambda about: about["keys"].pop(),
        lambda about: about.update(model=[]),
        lambda about: about.update(model=None),
        lambda about: about["model"].update(seed=float("inf")),
        lambda about: about["model"]["weights"][0].__setitem__(1, "unheard"),
        lambda about: about["model"]["weights"][0].__setitem__(2, []),
        lambda about: about["model"]["weights"][0].__setitem__(2, [10**9, 10**9]),
        lambda about: about["model"]["weights"][0].__setitem__(3, 10**9),
        lambda about: about["model"]["weights"].append(3),
        lambda about: about.update(config={"gama": 1}),
        lambda about: about.update(config=3),
    ],
)
def test_unsound_descriptions_are_refused(refused, change):
    save_factors(trained(), "f.safetensors")
    rewritten("f.safetensors", change)
    assert "f.safetensors" in refused("export", "f.safetensors", "-o", "d", code=1)
    with pytest.raises(PayloadError):
        read_checkpoint("f.safetensors")


def test_a_description_that_fits_other_tensors_is_refused(refused):
    save_factors(trained(), "f.safetensors")
    about = {METADATA_KEY: json.dumps(read_about("f.safetensors"))}
    tensors = load_file("f.safetensors")
    changed = {**tensors, "head.x1": torch.ones(20, 2)}
    save_file(changed, "f.safetensors", metadata=about)
    assert "['head.x1']" in refused("export", "f.safetensors", "-o", "d", code=1)


def test_truncated_files_are_refused(refused):
    save_factors(trained(), "f.safetensors")
    with open("f.safetensors", "rb") as file:
        data = file.read()
    for length in (0, 5, 9, 300, len(data) // 2, len(data) - 1):
        with open("g", "wb") as file:
            file.write(data[:length])
        refused("export", "g", "-o", "d", code=1)


# In code


def test_load_factors_resumes_a_model(tmp_path):
    model = trained("pfedpara")
    save_factors(model, tmp_path / "f.safetensors")
    other = fedpara.convert(Net(), method="pfedpara", gamma=0.3)
    load_factors(other, tmp_path / "f.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    save_factors(model, tmp_path / "s.safetensors", private=False)
    third = fedpara.convert(Net(), method="pfedpara", gamma=0.3)
    before = {k: v.clone() for k, v in fedpara.split(third).private.items()}
    load_factors(third, tmp_path / "s.safetensors")
    assert torch.equal(third.head.x1, model.head.x1)
    assert all(torch.equal(v, before[k]) for k, v in fedpara.split(third).private.items())


def test_load_factors_refuses_another_model(tmp_path):
    save_factors(trained(), tmp_path / "f.safetensors")
    with pytest.raises(MismatchError, match=r"body\.0\.weight"):
        load_factors(fedpara.convert(Net(), gamma=0.9), tmp_path / "f.safetensors")


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(PayloadError, match=r"d.safetensors"):
        save_dense(tmp_path / "d.safetensors", {"a": torch.ones(2, dtype=torch.complex128)},
                   model="x", method="y")  # fmt: skip
    assert os.listdir(tmp_path) == []
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        save_dense(tmp_path / "folder", {"a": torch.ones(2)}, model="x", method="y")
    assert os.listdir(tmp_path) == ["folder"]


def test_the_module_of_the_fixture_is_the_one_used_here(command):
    assert command("plan", "user_models:Net")[0] == 0
    assert list(import_module("user_models").Net().state_dict()) == list(Net().state_dict())
