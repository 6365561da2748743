"""What the optimizers promise beside equality with their papers: equivalences, any trainer, any
model, the guard, a server that starts again, codecs, and errors that say what to do."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.core import ClientTrainer
from torch import nn

from fedpara_plugins import ConfigError, convert
from fedpara_plugins.optimizers import StoredCorrectionState
from fedpara_plugins.support import PrefixView
from fedpara_plugins_fedml.rules import RULES, ClientReply, Rule, rule_for
from fedpara_plugins_fedml.settings import FedMLSettings
from harness.fedml.optimizer_cases import (
    CASES,
    CLIENTS,
    GAMMA,
    METHODS,
    assert_same,
    batch_model,
    published_loop,
    run_case,
    with_keys,
)
from harness.fedml.project import arguments, dataset, model

SHORT = {"comm_round": 3, "epochs": 1}
EVERY = ("fedavg", "fedprox", "fedopt-adam", "scaffold", "feddyn", "fednova", "mime", "mimelite")
"""One case for each optimizer."""


def state(name: str, method: str = "none", **keys: Any) -> Mapping[str, torch.Tensor]:
    return run_case(with_keys(name, **keys), method, model(), **SHORT).state


# Equivalences


@pytest.mark.in_turn
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("fedprox", {"fedprox_mu": 0.0}),
        ("fedopt-sgd", {"server_lr": 1.0}),
        # The same client every round, and all clients: c = c_i, so nothing is added.
        ("scaffold", {"client_num_in_total": 1, "client_num_per_round": 1}),
    ],
)
def test_is_fedavg(name: str, keys: Mapping[str, Any], method: str) -> None:
    clients = {k: v for k, v in keys.items() if k.startswith("client_num")}
    assert_same(state(name, method, **keys), state("fedavg", method, **clients))


def test_fednova_is_fedavg_where_clients_take_equally_many_steps() -> None:
    data = dataset(CLIENTS)
    for client in range(CLIENTS):
        data[5][client] = data[5][client][:2]
        data[4][client] = 20
    found, wanted = (
        run_case(CASES[name], "none", model(), data=data, **SHORT).state
        for name in ("fednova", "fedavg")
    )
    assert_same(found, wanted)


def test_mimelite_without_momentum_is_the_uniform_mean() -> None:
    found = state("mimelite", server_momentum=0.0)
    wanted = state("scaffold", fedpara_guard_collect=100, fedpara_guard=True, fedpara_guard_tau=1e9)
    assert_same(found, wanted)


def test_the_first_round_of_feddyn_is_fedprox_with_a_longer_step() -> None:
    """With zero duals, and h taken in first: 1 + |P| / m times as far as the uniform mean."""
    net = model()
    start = {k: v.clone() for k, v in net.state_dict().items()}
    data = dataset(CLIENTS)
    for client in range(CLIENTS):  # so that FedProx's weights are uniform
        data[5][client], data[4][client] = data[5][client][:2], 20
    short = {"comm_round": 1, "epochs": 1}
    prox = run_case(with_keys("fedprox", fedprox_mu=0.5), "none", model(), data=data, **short)
    dyn = run_case(CASES["feddyn"], "none", model(), data=data, **short)
    longer = {k: v + 1.5 * (prox.state[k] - v) for k, v in start.items()}
    assert_same(dyn.state, longer)


# Any trainer


class OwnTrainer(ClientTrainer):
    """A user's: another loss (label smoothing), its own loop."""

    optimizer = staticmethod(lambda weights, lr: torch.optim.SGD(weights, lr=lr))

    def get_model_params(self) -> Any:
        return self.model.cpu().state_dict()

    def set_model_params(self, model_parameters: Any) -> None:
        self.model.load_state_dict(model_parameters)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        self.model.train()
        optimizer = self.optimizer(self.model.parameters(), args.learning_rate)
        for _ in range(args.epochs):
            for inputs, labels in train_data:
                optimizer.zero_grad()
                smooth = {"label_smoothing": 0.1}
                loss = nn.functional.cross_entropy(self.model(inputs), labels, **smooth)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    def test(self, test_data: Any, device: Any, args: Any) -> Any:
        return {"test_correct": 1, "test_loss": 1.0, "test_total": 1}


class MomentumTrainer(OwnTrainer):
    optimizer = staticmethod(lambda weights, lr: torch.optim.SGD(weights, lr=lr / 2, momentum=0.5))


class AdamTrainer(OwnTrainer):
    optimizer = staticmethod(lambda weights, lr: torch.optim.Adam(weights, lr=0.01))


def with_trainer(name: str, kind: type[OwnTrainer], method: str = "none", **keys: Any) -> Any:
    return run_case(with_keys(name, **keys), method, model(), client_trainer=kind, **SHORT)


@pytest.mark.in_turn
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["fedavg", "fedprox", "fedopt-adam", "scaffold", "feddyn", "fednova"]
)
def test_a_users_own_trainer(name: str, method: str) -> None:
    found = with_trainer(name, OwnTrainer, method)
    wanted = published_loop(CASES[name], method, model(), epochs=1, smoothing=0.1)
    assert_same(found.state, wanted.run(SHORT["comm_round"], 2))


def test_fednova_counts_the_momentum_of_a_users_own_sgd() -> None:
    found = with_trainer("fednova", MomentumTrainer)
    case = with_keys("fednova", momentum=0.5, learning_rate=0.05)
    wanted = published_loop(case, "none", model(), epochs=1, smoothing=0.1)
    assert_same(found.state, wanted.run(SHORT["comm_round"], 2))


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedopt-adam", "feddyn"])
def test_bears_any_optimizer(name: str) -> None:
    before = model().state_dict()
    found = with_trainer(name, AdamTrainer).state
    assert all(torch.isfinite(v).all() for v in found.values())
    assert any((found[k] - v).abs().max() > 1e-3 for k, v in before.items())


@pytest.mark.parametrize(
    ("name", "words"), [("scaffold", "plain SGD"), ("fednova", "torch.optim.SGD")]
)
def test_refuses_an_optimizer_that_it_cannot_correct(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        with_trainer(name, AdamTrainer)


def test_mime_refuses_a_users_own_trainer() -> None:
    with pytest.raises(ConfigError, match="leave client_trainer out"):
        with_trainer("mimelite", OwnTrainer)


# Any model


@pytest.mark.in_turn
@pytest.mark.parametrize("method", ["none", "pfedpara"])
@pytest.mark.parametrize("name", [*EVERY, "scaffold-one"])
def test_buffers_are_averaged(name: str, method: str) -> None:
    found = run_case(CASES[name], method, batch_model(), **SHORT).state
    wanted = published_loop(CASES[name], method, batch_model(), epochs=1)
    assert_same(found, wanted.run(SHORT["comm_round"], 2), atol=5e-6)
    counters = [v for k, v in found.items() if k.endswith("num_batches_tracked")]
    assert counters
    assert all(int(value) > 0 and value.dtype == torch.int64 for value in counters)


def test_frozen_parameters_stay() -> None:
    for name in EVERY:
        net = model()
        frozen = net[0].weight
        frozen.requires_grad_(False)
        before = frozen.clone()
        found = run_case(CASES[name], "none", net, comm_round=2, epochs=1).state
        assert (found["0.weight"] - before).abs().max() < 1e-6, name  # a mean of equals, rounded
        assert (found["2.weight"] - model().state_dict()["2.weight"]).abs().max() > 1e-3, name


# The guard


def test_the_guard_collects_bounds_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="fedpara.fedml")
    state("scaffold", fedpara_guard=True, fedpara_guard_tau=0.5, fedpara_guard_collect=1)
    said = caplog.text
    assert "SCAFFOLD: the guard only collects in this round (1 so far)" in said
    assert "SCAFFOLD: the guard bounded" in said


@pytest.mark.parametrize(("optimizer", "by_default"), [("SCAFFOLD", True), ("FedDyn", False)])
def test_scaffold_has_the_guard_unless_switched_off_and_feddyn_the_other_way(
    optimizer: str, by_default: bool
) -> None:
    cases: list[tuple[dict[str, Any], bool]] = [({}, by_default)]
    cases += [({"fedpara_guard": on}, on) for on in (True, False)]
    for keys, on in cases:
        rule: Any = made(optimizer, **keys)
        assert (rule.guard is not None) == on


def test_the_guard_holds_at_a_rate_where_scaffold_does_not() -> None:
    """Few updates are over the bound, and the model is not what it is without."""
    free = state("scaffold", fedpara_guard=False)
    held = state("scaffold", fedpara_guard=True, fedpara_guard_tau=0.3, fedpara_guard_collect=0)
    way = {k: v - model().state_dict()[k] for k, v in held.items()}
    wide = {k: v - model().state_dict()[k] for k, v in free.items()}
    assert sum(float(v.square().sum()) for v in way.values()) < 0.8 * sum(
        float(v.square().sum()) for v in wide.values()
    )


def test_a_client_whose_training_gives_nan_counts_for_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = dataset(CLIENTS)
    data[5][1] = [(inputs * float("nan"), labels) for inputs, labels in data[5][1]]
    for name in EVERY:
        caplog.clear()
        keys = {"client_num_per_round": CLIENTS, "comm_round": 2, "epochs": 1}
        found = run_case(CASES[name], "none", model(), data=data, **keys).state
        assert all(torch.isfinite(v).all() for v in found.values()), name
        assert "left out client 1" in caplog.text, name
        assert "left out client 0" not in caplog.text, name


@pytest.mark.parametrize("optimizer", ["FedOpt", "FedNova"])
def test_an_aggregate_that_is_no_number_leaves_no_trace_in_the_servers_momentum(
    optimizer: str,
) -> None:
    keys = {"server_momentum": 0.5, "gmf": 0.5}
    hurt, well = made(optimizer, **keys), made(optimizer, **keys)
    x = {"w": torch.zeros(3), "b": torch.tensor(0)}
    for rule in (hurt, well):
        after(rule, 1, x)
    tiny, good = answers(2, x["w"])
    bad = [replace(tiny, state={**tiny.state, "w": torch.full((3,), torch.inf)}), good]

    def broken(some: Any) -> dict[str, torch.Tensor]:
        """Aggregate as a user's own code might."""
        return {k: v * (torch.inf if v.is_floating_point() else 1) for k, v in mean(some).items()}

    assert not torch.isfinite(hurt.step(x, bad, broken)["w"]).all()
    assert torch.equal(after(hurt, 3, x)["w"], after(well, 3, x)["w"])


@pytest.mark.parametrize("optimizer", ["SCAFFOLD", "FedDyn", "FedNova"])
def test_a_client_without_its_half_is_left_out_and_named(
    optimizer: str, caplog: pytest.LogCaptureFixture
) -> None:
    x = {"w": torch.zeros(3), "b": torch.tensor(0)}
    odd, good = answers(1, x["w"])
    rule, alone = made(optimizer), made(optimizer)
    for one in (rule, alone):
        one.begin(1, x, ["0", "1"])
    found = rule.step(x, [replace(odd, report={}), good], mean)
    assert torch.equal(found["w"], alone.step(x, [good], mean)["w"])
    assert "left out client 0" in caplog.text


def test_clients_that_all_run_another_optimizer_end_the_run() -> None:
    x = {"w": torch.zeros(3), "b": torch.tensor(0)}
    rule = made("SCAFFOLD")
    rule.begin(1, x, ["0", "1"])
    with pytest.raises(ConfigError, match="set federated_optimizer: SCAFFOLD"):
        rule.step(x, [replace(a, report={}) for a in answers(1, x["w"])], mean)


# A server that starts again


def made(optimizer: str, **keys: Any) -> Rule:
    args = arguments(federated_optimizer=optimizer, **keys)
    rule = rule_for(args, FedMLSettings.from_args(args), clients=CLIENTS)
    rule.trained = frozenset({"w"})
    return rule


STATEFUL = {
    "FedOpt": {"server_optimizer": "adam", "server_lr": 0.1},
    "FedOpt momentum": {"server_optimizer": "sgd", "server_momentum": 0.9},
    "FedOpt yogi": {"server_optimizer": "yogi"},
    "FedOpt flower": {"server_optimizer": "adam", "fedpara_server_rule": "flower"},
    "SCAFFOLD": {"server_lr": 0.5},
    "FedDyn": {"fedpara_guard": True, "fedpara_guard_collect": 0},
    "FedNova": {"gmf": 0.5, "mu": 0.1},
    "Mime": {"server_optimizer": "adam", "mimelite": True},
}


def answers(seed: int, x: torch.Tensor) -> list[ClientReply]:
    source = torch.Generator().manual_seed(seed)

    def one(client: str) -> ClientReply:
        moved = {"w": x + torch.randn(3, generator=source), "b": torch.tensor(seed)}
        gradient = {"w": torch.randn(3, generator=source)}
        report = {"since": 0, "kept": 1.0, "normaliser": 2.0 + seed, "steps": 3}
        records = {"change": gradient, "gradient": gradient}
        return ClientReply(client, 10.0 + seed, moved, records, report)

    return [one("0"), one("1")]


def mean(some: Any) -> dict[str, torch.Tensor]:
    whole = sum(a.examples for a in some)
    return {k: sum(a.examples / whole * a.state[k] for a in some) for k in some[0].state}


def after(rule: Rule, number: int, x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    rule.begin(number, x, ["0", "1"])
    return dict(rule.step(x, answers(number, x["w"]), mean))


@pytest.mark.parametrize("name", STATEFUL)
def test_a_rule_goes_on_from_its_saved_state(name: str) -> None:
    keys, optimizer = STATEFUL[name], name.split()[0]
    rule, other = made(optimizer, **keys), made(optimizer, **keys)
    x = {"w": torch.zeros(3), "b": torch.tensor(0)}
    x1 = after(rule, 1, x)
    saved = rule.state_dict()
    other.load_state_dict(saved)
    fresh = made(optimizer, **keys)
    x2, again, without = after(rule, 2, x1), after(other, 2, x1), after(fresh, 2, x1)
    assert torch.equal(x2["w"], again["w"])
    assert rule.records().keys() == other.records().keys()
    if optimizer not in ("SCAFFOLD", "Mime"):  # their memory is in what they send
        assert not torch.equal(x2["w"], without["w"])
    else:
        rule.begin(3, x2, ["0"])
        other.begin(3, x2, ["0"])
        fresh.begin(3, x2, ["0"])
        for key, record in rule.records().items():
            assert torch.equal(record["w"], other.records()[key]["w"])
        assert any(
            not torch.equal(record["w"], fresh.records()[key]["w"])
            for key, record in rule.records().items()
        )


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize(
    "name", [*EVERY, "scaffold-one", "fedopt-momentum", "fedopt-yogi", "fednova-momentum"]
)
def test_a_run_that_is_started_again_goes_on(name: str, tmp_path: Path) -> None:
    """Server and clients from their files after two rounds; the third is as if nothing had been."""
    keys = {"epochs": 1, "fedpara_codec": "lossless"}
    whole = run_case(CASES[name], "pfedpara", model(), comm_round=3, **keys).state
    kept = {"fedpara_state_dir": str(tmp_path), **keys}
    two = run_case(CASES[name], "pfedpara", model(), comm_round=2, **kept).state
    three = run_case(CASES[name], "pfedpara", model(), comm_round=3, **kept)
    assert three.runner.runner.server.round == 3
    assert {sent.round for sent in three.sent} == {3}
    assert_same(three.state, whole, atol=1e-7)
    assert any(not torch.equal(two[key], value) for key, value in whole.items())


# Codecs


@pytest.mark.in_turn(every=3)
@pytest.mark.parametrize("name", EVERY)
def test_a_lossless_codec_changes_nothing(name: str) -> None:
    assert_same(state(name, "pfedpara", fedpara_codec="lossless"), state(name, "pfedpara"), 0.0)


@pytest.mark.in_turn(every=3)
@pytest.mark.parametrize("codec", ["int8", "balanced"])
@pytest.mark.parametrize("name", EVERY)
def test_a_lossy_codec_ends_close(name: str, codec: str) -> None:
    start = convert(model(), method="fedpara", gamma=GAMMA).state_dict()
    exact, coded = (state(name, "fedpara", fedpara_codec=text) for text in ("none", codec))

    def distance(a: Any, b: Any) -> float:
        return float(sum(((a[k] - b[k]) ** 2).sum() for k in start) ** 0.5)

    share = 0.1 if name == "fedopt-adam" else 0.06  # its root enlarges what is small
    assert 0 < distance(coded, exact) <= share * distance(exact, start)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_server_and_clients_do_not_drift_apart_through_a_lossy_codec(name: str) -> None:
    """The sum on the server is that of what the clients keep, whatever the codec has lost."""
    case = with_keys(name, fedpara_codec="balanced")
    run = run_case(case, "fedpara", model(), comm_round=5, epochs=1).runner.runner
    sums = run.server.rule.sums
    kept = []
    for client in range(CLIENTS):
        with contextlib.closing(run.clients._storages.open(str(client))) as storage:
            found = StoredCorrectionState(
                PrefixView(storage, "rule/"), case.optimizer, str(client)
            ).correction
            kept.append(found.pending if found.pending_round else found.confirmed)
    assert len(sums.rounds) == CLIENTS
    for key, total in sums.total.items():
        whole = sum(own[key].double() for own in kept if own is not None)
        assert float(total.abs().max()) > 1e-4
        torch.testing.assert_close(total, whole, rtol=0, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    ("optimizer", "keys", "words"),
    [
        ("FedOpt", {"server_optimizer": "adan"}, "did you mean adam"),
        ("FedOpt", {"server_optimizer": "lbfgs"}, "is not known"),
        ("FedOpt", {"server_optimizer": "adamw", "fedpara_server_rule": "flower"}, "adagrad"),
        ("FedOpt", {"server_lr": "fast"}, "server_lr: expected a number"),
        ("FedOpt", {"server_optimizer": "adam", "fedpara_server_beta_1": 1.5}, "server_beta_1"),
        ("FedProx", {"fedprox_mu": -1}, "fedprox_mu: expected a number from 0"),
        ("FedDyn", {"feddyn_alpha": 0}, "alpha must be a positive number"),
        ("FedNova", {"nesterov": True}, "needs a momentum"),
        ("Mime", {"server_optimizer": "yogi"}, "no base algorithm"),
        ("Scaffold", {}, "did you mean SCAFFOLD"),
        ("HierarchicalFL", {}, "has no such optimizer"),
    ],
)
def test_bad_keys_are_said_at_once(optimizer: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_case(with_keys("fedavg", federated_optimizer=optimizer, **keys), "none", model())


def test_every_optimizer_has_defaults_for_its_keys() -> None:
    for optimizer in RULES:
        case = with_keys("fedavg", federated_optimizer=optimizer)
        found = run_case(case, "none", model(), comm_round=1, epochs=1).state
        assert all(torch.isfinite(v).all() for v in found.values()), optimizer
