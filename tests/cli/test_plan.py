"""``fedpara plan``: figures that agree with what is really sent, and a gamma that fits."""

import copy
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import fedpara_plugins as fedpara
from fedpara_plugins.cli.plan import Link, choose_gamma, message_bytes, plan_traffic
from fedpara_plugins.codecs import Description, HeaderForm, encode_payload, parse_codec
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.support.units import parse_rate, parse_size, readable_bytes, readable_seconds


def net():
    return nn.Sequential(nn.Conv2d(8, 64, 3), nn.BatchNorm2d(64), nn.Linear(256, 64))


def line_of(out, label):
    return next(line for line in out.splitlines() if re.match(rf"{re.escape(label)}\s\s", line))


def test_table_per_layer_and_seconds(command):
    code, out, err = command(
        "plan", "user_models:Net", "--gamma", "0.2", "--uplink", "1Mbit", "--downlink", "10 Mbit/s"
    )
    assert (code, err) == (0, "")
    torch.manual_seed(0)
    model = import_module("user_models").Net()
    dense = sum(v.numel() * v.element_size() for v in model.state_dict().values())
    shared = sum(
        v.numel() * v.element_size()
        for v in fedpara.convert(model, method="fedpara", gamma=0.2).state_dict().values()
    )
    rank = model.head.plans["weight"].rank
    head = line_of(out, "head.weight").split()
    assert head[1:4] == ["Linear", "20x1024", str(rank)]
    assert head[4:6] == ["20,480", f"{2 * rank * 1044:,}"]
    assert head[6:8] == [f"{4 * 20480:,}", f"{8 * rank * 1044:,}"]
    assert "BatchNorm2d is no kind" in line_of(out, "norm")
    up, down = readable_seconds(shared * 8 / 1e6), readable_seconds(shared * 8 / 1e7)
    factors = line_of(out, "fedpara")
    assert readable_bytes(shared) in factors
    assert up in factors
    assert down in factors
    assert f"{dense / shared:.1f}x" in factors
    assert readable_bytes(dense) in line_of(out, "dense")
    assert "estimate" not in out


@pytest.mark.parametrize("method", ["fedpara", "pfedpara"])
def test_coded_bytes_are_those_of_an_encoded_update(method):
    """Bytes depend on shapes and the distribution only: another draw comes out within 3 %."""
    config = fedpara.FedParaConfig(method=method, gamma=0.4, codec="int8")
    model = net()
    plan = plan_traffic(model, config, link=Link(up=1e6), clients=3, rounds=5)
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.BatchNorm2d, nn.Linear]
    converted = fedpara.convert(copy.deepcopy(model), config)
    state = fedpara.split(converted).shared
    torch.manual_seed(5)
    update = {
        name: value + 0.003 * (float(value.std()) or 1.0) * torch.randn_like(value)
        if value.is_floating_point()
        else value
        for name, value in state.items()
    }
    described = fedpara.ModelSpec.of(converted).to_json()
    data = encode_payload(
        update,
        codec=parse_codec("int8"),
        reference=state,
        model=described,
        form=HeaderForm(Description.of(described, state)),  # as in all messages but the first
    )
    labels = [message.label for message in plan.messages]
    assert labels == ["dense", "dense, delta+int8+zlib", method, f"{method}, delta+int8+zlib"]
    assert plan.messages[-1].size == pytest.approx(len(data), rel=0.03)
    raw = sum(value.numel() * value.element_size() for value in state.values())
    assert plan.messages[2].size == raw
    assert raw / 6 < plan.messages[-1].size < raw / 3
    first = encode_payload(
        state, codec=parse_codec("zlib"), model=fedpara.ModelSpec.of(converted).to_json()
    )
    assert plan.first_contact == pytest.approx(len(first), rel=0.01)


def test_totals_and_the_estimate_is_called_one(command):
    words = ["--gamma", "0.2", "--codec", "int8", "--clients", "16", "--rounds", "100"]
    code, out, _ = command("plan", "user_models:Net", *words)
    assert code == 0
    config = fedpara.FedParaConfig(method="fedpara", gamma=0.2, codec="int8")
    size = message_bytes(import_module("user_models").Net(), config)
    total = re.search(r"([\d.]+) MB up and down", line_of(out, "fedpara, delta+int8+zlib"))
    assert float(total[1]) == pytest.approx(2 * 1600 * size / 1e6, rel=0.01)
    assert "100 rounds, 16 clients" in out
    assert "estimate: one synthetic update" in out
    assert "First contact" in out
    assert "/ round" not in out


def test_pfedpara_sends_the_shared_half():
    config = fedpara.FedParaConfig(method="pfedpara", gamma=0.4)
    plan = plan_traffic(net(), config)
    shared = fedpara.split(fedpara.convert(net(), config)).shared
    assert plan.messages[-1].size == sum(v.numel() * v.element_size() for v in shared.values())
    assert plan.first_contact == 0


def test_method_none_plans_the_dense_model(command):
    code, out, _ = command("plan", "user_models:Net", "--method", "none", "--codec", "lossless")
    assert code == 0
    assert line_of(out, "dense, planes+entropy:prefer=zstd")
    assert "rank" in out


@pytest.mark.parametrize("method", ["lowrank", "fedpara", "pfedpara"])
@pytest.mark.parametrize("codec", ["none", "int8"])
def test_the_chosen_gamma_is_the_largest_that_fits(method, codec):
    config = fedpara.FedParaConfig(method=method, codec=codec)
    low = message_bytes(net(), fedpara.FedParaConfig(method=method, codec=codec, gamma=0.0))
    high = message_bytes(net(), fedpara.FedParaConfig(method=method, codec=codec, gamma=0.9))
    target = (low + high) // 2
    chosen = choose_gamma(net(), config, target=target)
    assert 0 < chosen.gamma < 0.9
    assert message_bytes(net(), chosen) <= target
    following = fedpara.FedParaConfig(method=method, codec=codec, gamma=chosen.gamma + 0.001)
    assert message_bytes(net(), following) > target


def test_target_bytes_on_the_command_line(command):
    code, out, _ = command("plan", "user_models:Net", "--target-bytes", "70kB")
    assert code == 0
    gamma = float(re.match(r"gamma (\S+) is the largest that fits 70,000 bytes", out)[1])
    sent = int(re.search(r"([\d,]+) bytes sent", out)[1].replace(",", ""))
    assert sent <= 70_000
    config = fedpara.FedParaConfig(method="fedpara", gamma=gamma)
    assert message_bytes(import_module("user_models").Net(), config) == sent


def test_a_target_beyond_the_largest_model_gives_gamma_1():
    assert choose_gamma(net(), fedpara.FedParaConfig(method="fedpara"), target=10**9).gamma == 1


def test_an_unreachable_target_names_the_smallest_figure(refused):
    error = refused("plan", "user_models:Net", "--target-bytes", "1kB")
    config = fedpara.FedParaConfig(method="fedpara", gamma=0.0)
    smallest = message_bytes(import_module("user_models").Net(), config)
    assert "1,000 bytes" in error
    assert f"{smallest:,} bytes" in error


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["plan"], ["required", "FACTORY"]),
        (["paln"], ["paln", "plan"]),
        ([], ["COMMAND"]),
        (["plan", "user_models"], ["package.module:factory", "'user_models'"]),
        (["plan", "user_models:Nett"], ["user_models:Nett", "AttributeError"]),
        (["plan", "no_such_module:Net"], ["no_such_module", "ModuleNotFoundError"]),
        (["plan", "user_models:number"], ["user_models:number", "torch.nn.Module", "int"]),
        (["plan", "user_models:Subclassed"], ["user_models:Subclassed", "in_features"]),
        (["plan", "user_models:broken"], ["RuntimeError: no such", "user_models.py, line "]),
        (["plan", "user_models:Net", "--gama", "0.1"], ["--gama", "did you mean --gamma"]),
        (["plan", "user_models:Net", "--gam", "0.1"], ["--gam", "did you mean --gamma"]),
        (["plan", "user_models:Net", "--gamma", "much"], ["gamma", "float", "much"]),
        (["plan", "user_models:Net", "--gamma", "-1"], ["gamma", "from 0 to 1", "-1"]),
        (["plan", "user_models:Net", "--gamma"], ["--gamma", "expected one argument"]),
        (["plan", "user_models:Net", "--method", "fedpera"], ["fedpera", "pfedpara"]),
        (["plan", "user_models:Net", "--codec", "int7"], ["int7", "zlib"]),
        (["plan", "user_models:Net", "--exclude", "nose"], ["nose", "head"]),
        (["plan", "user_models:Net", "--uplink", "1MB"], ["Mbit", "'1MB'"]),
        (["plan", "user_models:Net", "--uplink", "0Mbit"], ["positive", "0Mbit"]),
        (["plan", "user_models:Net", "--target-bytes", "300"], ["MiB", "'300'"]),
        (["plan", "user_models:Net", "--rounds", "0"], ["--rounds", "'0'"]),
        (["plan", "user_models:Net", "--clients", "1.5"], ["--clients", "'1.5'"]),
        (["plan", "user_models:Net", "--target-bytes", "1MB", "--rank", "3"], ["rank", "gamma"]),
        (["plan", "user_models:Net", "--target-bytes", "1MB", "--gamma", "0"], ["leave out"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_used_is_one_line_and_code_2(refused, words, expected):
    error = refused(*words)
    for word in expected:
        assert word in error


def test_a_model_with_nothing_to_factorise_is_refused_with_code_1(refused):
    assert "no layer of the model can be factorised" in refused("plan", "user_models:tiny", code=1)


def test_a_module_may_stand_there_instead_of_a_factory(command):
    assert command("plan", "user_models:ready")[0] == 0


def test_counts_are_checked():
    with pytest.raises(ConfigError, match="rounds"):
        plan_traffic(net(), fedpara.FedParaConfig(method="fedpara"), rounds=0)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1Mbit", 1e6), ("500 kbit/s", 5e5), ("2.5Gbit", 2.5e9), (".5Mbit", 5e5), ("8bit", 8)],
)
def test_rates(text, value):
    assert parse_rate(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("300kB", 300_000), ("1.5 MB", 1_500_000), ("4MiB", 4 * 2**20), ("2KiB", 2048), ("7B", 7)],
)
def test_sizes(text, value):
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "MB", "1", "1mb", "1Mb", "-1MB", "1e9999MB", "nanMB", "1MB2"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="300kB"):
        parse_size(text)


def test_how_figures_read():
    sizes = [0, 420, 12_300, 999_999, 1_280_000, 61_000_000, 5_000_000_000]
    texts = ["0 B", "420 B", "12.3 kB", "1,000 kB", "1.28 MB", "61.0 MB", "5.00 GB"]
    assert [readable_bytes(size) for size in sizes] == texts
    times = [0.012, 1, 50, 119.96, 488, 7300, 200_000]
    texts = ["12 ms", "1.00 s", "50.0 s", "120 s", "8.13 min", "2.03 h", "2.31 d"]
    assert [readable_seconds(seconds) for seconds in times] == texts


def test_help_has_every_option_of_the_config(capsys):
    from fedpara_plugins.cli.command import main

    with pytest.raises(SystemExit) as end:
        main(["plan", "--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in fedpara.FedParaConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text
    assert "an explicit rank for every layer" in text


def test_the_core_does_not_import_the_command_line():
    code = (
        "import sys, fedpara_plugins; names = ('cli', 'cli.doctor'); "
        "sys.exit([n for n in names if 'fedpara_plugins.' + n in sys.modules] or None)"
    )
    environment = {"PYTHONPATH": str(Path(fedpara.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")


def test_frozen_parameters_are_in_the_plain_dense_message_alone():
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(True)
    net[0].requires_grad_(False)
    config = FedParaConfig(method="fedpara", gamma=0.1, codec="lossless")
    plan = plan_traffic(net, config)
    dense, coded, factors, both = (message.size for message in plan.messages)
    one = 4 * (64 * 64 + 64)
    assert dense == 2 * one
    assert plan.frozen == one
    assert factors < one
    assert coded < 1.2 * one
    assert both < factors + 4000
    assert "Frozen parameters (16.6 kB)" in str(plan)
    assert plan_traffic(net, FedParaConfig()).messages[0].size == dense
    assert "Frozen" not in str(plan_traffic(net, FedParaConfig()))
