"""FedML's hooks in the plugin's engine see plain named tensors, and their changes count."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from fedml.ml.aggregator.default_aggregator import DefaultServerAggregator
from fedml.ml.trainer.my_model_trainer_classification import ModelTrainerCLS
from torch import Tensor

from fedpara_plugins import ConfigError, MismatchError, ModelSpec, convert
from fedpara_plugins.layers.personal import PersonalLinear
from fedpara_plugins.training.step_hooks import round_progress
from harness.fedml.project import dataset, forget_security, model, run
from harness.oracles.fedml_fedavg import FedAvgLoop

PERSONAL = {"fedpara_method": "pfedpara", "fedpara_gamma": 0.5}
PRIVACY = {
    "enable_dp": True,
    "mechanism_type": "gaussian",
    "epsilon": 1.0,
    "delta": 1e-5,
    "sensitivity": 1e-3,
}


@pytest.fixture(autouse=True)
def _security_forgotten() -> Iterator[None]:
    yield
    forget_security()


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - value).abs().max()) for name, value in other.items())


def plain_loop(rounds: int = 3, a_round: int = 2) -> dict[str, Tensor]:
    return FedAvgLoop(model(), dataset()[5]).run(rounds, a_round)


# The user's own classes


class Told:
    """Notes which hooks were called, and with what."""

    calls: ClassVar[list[tuple[str, Any]]] = []


def check_plain(params: Any) -> None:
    assert type(params) is OrderedDict
    assert all(type(name) is str and type(value) is Tensor for name, value in params.items())


class OwnTrainer(ModelTrainerCLS):
    def on_before_local_training(self, train_data: Any, device: Any, args: Any) -> None:
        Told.calls.append(("before", (self.id, args.round_idx)))
        super().on_before_local_training(train_data, device, args)

    def set_model_params(self, params: Any) -> None:
        check_plain(params)
        super().set_model_params(params)

    def train(self, train_data: Any, device: Any, args: Any) -> None:
        assert train_data is self.local_train_dataset
        Told.calls.append(("train", self.id))
        super().train(train_data, device, args)

    def on_after_local_training(self, train_data: Any, device: Any, args: Any) -> None:
        Told.calls.append(("after", self.id))
        super().on_after_local_training(train_data, device, args)


class OwnAggregator(DefaultServerAggregator):
    """Averages without weights, and says so."""

    def on_before_aggregation(self, raw: Any) -> Any:
        Told.calls.append(("before_aggregation", len(raw)))
        for examples, params in raw:
            assert examples > 0
            check_plain(params)
        return super().on_before_aggregation(raw)

    def aggregate(self, raw: Any) -> Any:
        Told.calls.append(("aggregate", [examples for examples, _ in raw]))
        first = raw[0][1]
        return OrderedDict((k, sum(p[k] for _, p in raw) / len(raw)) for k in first)

    def on_after_aggregation(self, params: Any) -> Any:
        check_plain(params)
        Told.calls.append(("after_aggregation", len(params)))
        return super().on_after_aggregation(params)

    def test_all(self, train: Any, test: Any, device: Any, args: Any) -> bool:
        Told.calls.append(("test_all", sorted(test)))
        return True


@pytest.mark.parametrize("method", ["none", "pfedpara"])
def test_the_user_s_trainer_and_aggregator_are_used(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """FedML's single process ignores both."""
    caplog.set_level("INFO")
    Told.calls = []
    outcome = run(
        client_trainer=OwnTrainer,
        server_aggregator=OwnAggregator,
        fedpara_method=method,
        fedpara_mend=True,
    )
    one = [("before", (2, 0)), ("train", 2), ("after", 2)]
    other = [("before", (3, 0)), ("train", 3), ("after", 3)]
    names = len(outcome.state)
    ending = [
        ("before_aggregation", 2),
        ("aggregate", [40, 20]),
        ("after_aggregation", names),
        ("test_all", [0, 1, 2, 3]),
    ]
    assert Told.calls[:10] == [*one, *other, *ending]
    assert "your client_trainer and server_aggregator are used, which FedML ignores" in caplog.text
    assert "test_acc" not in caplog.text
    if method == "none":
        loop = FedAvgLoop(model(), dataset()[5])
        sizes = dict.fromkeys(range(4), 1)
        assert largest(outcome.state, plain_loop()) > 1e-3
        assert largest(outcome.state, unweighted(loop, sizes)) < 1e-5


def unweighted(loop: FedAvgLoop, sizes: dict[int, int]) -> dict[str, Tensor]:
    for number in range(3):
        after = [loop.trained(client) for client in loop.sample(number, 2)]
        loop.x = {k: torch.stack([each[k] for each in after]).mean(0) for k in loop.x}
    return loop.x


class Silent(ModelTrainerCLS):
    def test(self, test_data: Any, device: Any, args: Any) -> None:
        return None


def test_a_trainer_that_cannot_test_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    run(client_trainer=Silent, **PERSONAL)
    assert "clients are not tested: the trainer's test() returns NoneType" in caplog.text


# What a hook may return


class Reversing(DefaultServerAggregator):
    """Says nothing of whose models it returns, in another order."""

    def on_before_aggregation(self, raw: Any) -> Any:
        return raw[::-1], None


class Dropping(DefaultServerAggregator):
    """Leaves out the largest client, and returns copies with the places that are left."""

    def on_before_aggregation(self, raw: Any) -> Any:
        largest = max(range(len(raw)), key=lambda place: raw[place][0])
        kept = [place for place in range(len(raw)) if place != largest]
        return [(raw[n][0], OrderedDict(raw[n][1])) for n in kept], kept


@pytest.mark.parametrize("optimizer", ["FedAvg", "SCAFFOLD"])
def test_the_order_of_what_a_hook_returns_does_not_matter(optimizer: str) -> None:
    keys: dict[str, Any] = {
        "federated_optimizer": optimizer,
        "server_lr": 1.0,
        "fedpara_mend": True,
        "client_num_per_round": 4,
        "comm_round": 4,
    }
    usual, reverse = run(**keys), run(**keys, server_aggregator=Reversing)
    assert largest(reverse.state, usual.state) < 1e-6
    dropped = run(**keys, server_aggregator=Dropping)
    loop = FedAvgLoop(model(), dataset()[5])
    loop.sample = lambda number, a_round: [1, 2, 3]  # type: ignore[method-assign]
    wanted = loop.run(4, 3)
    assert (largest(dropped.state, wanted) < 1e-5) == (optimizer == "FedAvg")
    assert largest(dropped.state, usual.state) > 1e-4


class Scribbling(DefaultServerAggregator):
    """Uses its own model as a place for notes, in place, while the server still needs its state."""

    def on_before_aggregation(self, raw: Any) -> Any:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.zero_()
        return super().on_before_aggregation(raw)


def test_an_aggregator_that_changes_its_model_in_place_changes_nothing_of_the_servers() -> None:
    keys: dict[str, Any] = {"federated_optimizer": "FedOpt", "server_lr": 0.5, "comm_round": 1}
    usual = run(**keys, fedpara_mend=True)
    scribbled = run(**keys, fedpara_mend=True, server_aggregator=Scribbling)
    assert largest(scribbled.state, usual.state) == 0
    assert largest(usual.state, model().state_dict()) > 1e-3


class Nobody(DefaultServerAggregator):
    def on_before_aggregation(self, raw: Any) -> Any:
        return [], []


class Broken(DefaultServerAggregator):
    def aggregate(self, raw: Any) -> Any:
        return OrderedDict((k, v * float("nan")) for k, v in raw[0][1].items())


@pytest.mark.parametrize(
    ("kind", "words"), [(Nobody, "left nobody"), (Broken, "aggregate holds NaN or infinity in")]
)
def test_a_hook_that_leaves_nothing_sound_leaves_the_model_as_it_was(
    kind: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = run(server_aggregator=kind, fedpara_mend=True, comm_round=2)
    assert largest(outcome.state, model().state_dict()) == 0
    assert words in caplog.text


def test_a_hook_that_changes_names_or_shapes_is_told() -> None:
    class Renames(DefaultServerAggregator):
        def aggregate(self, raw: Any) -> Any:
            return OrderedDict((f"model.{k}", v) for k, v in raw[0][1].items())

    class Cuts(DefaultServerAggregator):
        def on_after_aggregation(self, params: Any) -> Any:
            return OrderedDict((k, v[:1]) for k, v in params.items())

    with pytest.raises(MismatchError, match="aggregator returned other names"):
        run(server_aggregator=Renames, fedpara_mend=True)
    with pytest.raises(MismatchError, match=r"aggregator returned '0\.weight' of shape"):
        run(server_aggregator=Cuts, fedpara_mend=True)


# Differential privacy, attacks, defences


def test_local_differential_privacy_reaches_what_is_sent_and_not_what_stays() -> None:
    noisy = run(**PRIVACY, dp_solution_type="ldp", fedpara_mend=True)
    apart = largest(noisy.state, plain_loop())
    assert 1e-5 < apart < 0.5
    # What never leaves a device gets no noise: after one round it is as without.
    keys = {**PERSONAL, "comm_round": 1}
    noisy = run(**PRIVACY, dp_solution_type="ldp", **keys)
    forget_security()
    plain = run(**keys)
    spec = plain.runner.runner.server.spec
    for name, value in plain.kept(2).items():
        assert torch.equal(noisy.kept(2)[name], value) == (name in spec.private_keys)


@pytest.mark.parametrize("codec", ["none", "balanced"])
def test_local_differential_privacy_bears_a_codec(codec: str) -> None:
    outcome = run(**PRIVACY, dp_solution_type="ldp", **PERSONAL, fedpara_codec=codec)
    assert all(torch.isfinite(value).all() for value in outcome.state.values())


def test_central_differential_privacy_adds_noise_on_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    outcome = run(**PRIVACY, dp_solution_type="cdp", **PERSONAL)
    forget_security()
    plain = run(**PERSONAL)
    spec = plain.runner.runner.server.spec
    for name, value in plain.state.items():
        same = torch.equal(outcome.state[name], value)
        assert same == (name in spec.private_keys), name
    assert largest(outcome.state, plain.state) < 0.5
    assert "differential privacy is applied, which FedML leaves out" in caplog.text


def test_clipping_on_the_server_bounds_what_was_decoded() -> None:
    """FedML clips the clients' models there, after the codec."""
    outcome = run(
        **{**PRIVACY, "sensitivity": 1e-9},
        dp_solution_type="cdp",
        max_grad_norm=0.5,
        fedpara_codec="balanced",
        comm_round=1,
    )
    size = torch.sqrt(sum(value.square().sum() for value in outcome.state.values()))
    assert 0.3 < float(size) <= 0.5001


def test_a_defence_sees_the_clients_models() -> None:
    """Clipping of the difference's norm, against a loop that does it."""
    bound = 0.05
    outcome = run(
        enable_defense=True,
        defense_type="norm_diff_clipping",
        norm_bound=bound,
        fedpara_method="fedpara",
        fedpara_gamma=0.5,
        comm_round=1,
        client_num_per_round=4,
    )
    net = convert(model(), method="fedpara", gamma=0.5)
    loop = FedAvgLoop(net, dataset()[5])
    parts = []
    for client in range(4):
        after = loop.trained(client)
        change = {k: after[k] - v for k, v in loop.x.items()}
        size = float(torch.sqrt(sum(v.square().sum() for v in change.values())))
        assert size > bound
        parts.append({k: v * bound / size for k, v in change.items()})
    sizes = [50, 30, 40, 20]
    for name, value in loop.x.items():
        moved = sum(s * part[name] for s, part in zip(sizes, parts, strict=True)) / sum(sizes)
        torch.testing.assert_close(outcome.state[name], value + moved, rtol=1e-4, atol=1e-6)


@pytest.mark.in_turn(every=2)
@pytest.mark.parametrize("kind", ["krum", "wise_median", "rfa", "slsgd", "3sigma"])
def test_other_defences_run(kind: str) -> None:
    options = {"krum": {"byzantine_client_num": 0}, "slsgd": {"trim_param_b": 1, "alpha": 0.5}}
    outcome = run(
        enable_defense=True,
        defense_type=kind,
        option_type=2,
        client_num_per_round=4,
        **options.get(kind, {}),
        **PERSONAL,
    )
    assert all(torch.isfinite(value).all() for value in outcome.state.values())
    assert largest(outcome.state, run(**PERSONAL, comm_round=1).state) > 0


def test_an_attack_acts_on_the_models_and_a_median_bears_it() -> None:
    attack = {
        "enable_attack": True,
        "attack_type": "byzantine",
        "attack_mode": "zero",
        "byzantine_client_num": 1,
    }
    keys = {"fedpara_mend": True, "client_num_per_round": 4}
    attacked = run(**attack, **keys)
    assert largest(attacked.state, plain_loop(a_round=4)) > 0.02
    forget_security()
    defended = run(**attack, **keys, enable_defense=True, defense_type="wise_median")
    smaller = sum(float(value.abs().sum()) for value in attacked.state.values())
    larger = sum(float(value.abs().sum()) for value in defended.state.values())
    assert smaller < 0.8 * larger


def test_poisoned_data_reach_the_trainer() -> None:
    seen: dict[int, Tensor] = {}

    class Looks(ModelTrainerCLS):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            seen[self.id] = torch.cat([labels for _, labels in train_data])
            super().train(train_data, device, args)

    data = dataset()
    loaders = {
        k: torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(*map(torch.cat, zip(*v, strict=True))), batch_size=10
        )
        for k, v in data[5].items()
    }
    data[5] = loaders
    data[6] = {k: loaders[k] for k in data[6]}
    run(
        data=data,
        client_trainer=Looks,
        fedpara_method="fedpara",
        fedpara_label_prior=True,
        enable_attack=True,
        attack_type="label_flipping",
        original_class_list=[0, 1],
        target_class_list=[3, 3],
        client_num_per_round=4,
        comm_round=1,
        ratio_of_poisoned_client=1.0,
    )
    # FedML counts visits, and takes the last one of a round for the next round's first.
    for client in range(3):
        own = loaders[client].dataset.tensors[1]
        assert (own < 2).any()
        assert torch.equal(seen[client].long(), torch.where(own < 2, 3, own))


# What cannot work


@pytest.mark.parametrize("kind", ["nbafl", "dp_clip"])
def test_a_bound_that_clients_promise_is_refused_with_a_lossy_codec(kind: str) -> None:
    keys = {**PRIVACY, "dp_solution_type": kind, "C": 1.0, "clipping_norm": 1.0}
    with pytest.raises(ConfigError, match="the bound would not hold there: set fedpara_uplink"):
        run(**keys, fedpara_codec="balanced")


def test_homomorphic_encryption_is_refused_with_its_reason() -> None:
    with pytest.raises(ConfigError, match="enable_fhe encrypts whole dense models"):
        run(enable_fhe=True, fedpara_codec="balanced")


# The core's own training options


def test_the_decoupled_schedule_starts_anew_in_each_round() -> None:
    phases: list[tuple[int, int, str]] = []

    class Watched(ModelTrainerCLS):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            training = round_progress(self.model)
            assert training is not None
            assert training.steps == 0
            phases.append((self.id, training.private_steps, training.phase))
            super().train(train_data, device, args)

    run(
        **PERSONAL,
        fedpara_schedule="decoupled",
        fedpara_private_steps=0.5,
        fedpara_first_private_steps=1,
        client_trainer=Watched,
        client_num_per_round=4,
        comm_round=2,
    )
    # The second round takes half of the steps that the client made in the first: its batches.
    batches = {client: len(data) for client, data in dataset()[5].items()}
    assert phases[:4] == [(client, 1, "private") for client in range(4)]
    assert phases[4:] == [
        (client, max(1, round(batches[client] / 2)), "private") for client in range(4)
    ]


def test_label_counts_come_from_each_client_s_data() -> None:
    outcome = run(**PERSONAL, fedpara_label_prior=True, client_num_per_round=4)
    for client, data in dataset()[5].items():
        labels = torch.cat([labels for _, labels in data])
        counts = torch.bincount(labels, minlength=4).double()
        wanted = torch.log((counts + 0.1) / (len(labels) + 1)).float()
        torch.testing.assert_close(outcome.kept(client)["4.label_prior"], wanted)
    assert isinstance(outcome.runner.runner.clients._trainer.model[4], PersonalLinear)
    assert not outcome.state["4.label_prior"].any()


def test_counting_labels_leaves_the_order_of_training_as_it_was() -> None:
    def shuffled() -> list[Any]:
        data = dataset()
        data[5] = {
            k: torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(*map(torch.cat, zip(*v, strict=True))),
                batch_size=10,
                shuffle=True,
            )
            for k, v in data[5].items()
        }
        return data

    orders: list[list[Tensor]] = []

    class Looks(ModelTrainerCLS):
        def train(self, train_data: Any, device: Any, args: Any) -> None:
            orders[-1].append(torch.cat([x for x, _ in train_data]))

    for prior in (False, True):
        orders.append([])
        torch.manual_seed(11)
        net = model()
        run(
            **PERSONAL,
            fedpara_label_prior=prior,
            net=net,
            data=shuffled(),
            client_trainer=Looks,
            comm_round=1,
        )
    assert all(torch.equal(a, b) for a, b in zip(*orders, strict=True))
    assert not torch.equal(orders[0][0], shuffled()[5][2].dataset.tensors[0])


def test_clipping_of_gradients_acts_in_the_user_s_loop() -> None:
    free = run(fedpara_method="fedpara", comm_round=1, learning_rate=0.5)
    held = run(fedpara_method="fedpara", fedpara_clip=0.01, comm_round=1, learning_rate=0.5)
    start = convert(model(), method="fedpara").state_dict()
    assert largest(held.state, start) < 0.2 * largest(free.state, start)


def test_the_spec_of_the_server_is_that_of_the_clients() -> None:
    outcome = run(**PERSONAL, comm_round=1)
    halves = outcome.runner.runner
    assert isinstance(halves.server.spec, ModelSpec)
    halves.server.spec.check_equal(halves.clients._spec, here="server", there="client")
