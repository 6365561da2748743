"""Errors that a user reads in the first round when something does not fit; damaged messages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fedml", reason="the FedML adapter; run in an environment that has fedml 0.9.6")

import torch
from torch import nn

from fedpara_plugins import (
    ConfigError,
    ConversionError,
)
from fedpara_plugins_fedml.messages.envelope import unpack
from fedpara_plugins_fedml.messages.head import Head
from fedpara_plugins_fedml.settings import FedMLSettings
from harness.fedml.project import arguments, dataset, model, run

ON = {"fedpara_method": "fedpara"}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"fedpara_metod": "fedpara"}, "unknown key fedpara_metod .*did you mean fedpara_method"),
        ({"fedpara_server_ruel": "x"}, "did you mean fedpara_server_rule"),
        ({"fedpara_method": "fedpora"}, "expected one of none, .*pfedpara"),
        ({"fedpara_codec": "balnced"}, "balnced"),
        ({**ON, "fedpara_gamma": 7}, "option 'fedpara_gamma'.*from 0 to 1"),
        ({**ON, "fedpara_references": "server"}, "references.*client, grid"),
        ({**ON, "fedpara_min_clients": "many"}, "fedpara_min_clients.*number"),
        ({**ON, "fedpara_mend": "perhaps"}, "fedpara_mend.*true or false"),
        ({"fedpara_args": {"fedpara_method": "fedpara"}}, "inside another section"),
        ({**ON, "federated_optimizer": "FedAgv"}, "did you mean FedAvg"),
        ({"federated_optimizer": "FedAgv"}, "FedML has no such optimizer.*engine.*has FedAvg"),
        ({**ON, "comm_round": None}, "key comm_round must be an integer, got None"),
        ({**ON, "client_num_in_total": 9}, "entry 4 .*has no client 4 .5 are missing"),
        ({**ON, "ml_engine": "jax"}, "ml_engine 'jax'"),
        (
            {**ON, "federated_optimizer": "Mime", "fedpara_schedule": "decoupled"},
            "Mime makes steps of its own.*shared factors would never be trained",
        ),
        ({**ON, "fedpara_include": "conv*"}, "pattern 'conv.' matches no layer"),
        ({**ON, "fedpara_exclude": "conv*"}, "option 'fedpara_exclude'"),
        ({**ON, "client_num_per_round": 0}, "client_num_per_round is 0, expected 1 or more"),
        ({**ON, "fedpara_min_clients": 9}, "fedpara_min_clients is 9, and no round has more than"),
        ({**ON, "frequency_of_the_test": None}, "frequency_of_the_test must be .*got nothing"),
        ({**ON, "frequency_of_the_test": 0}, "frequency_of_the_test must be .*got 0"),
    ],
)
def test_bad_keys_are_told_before_the_first_round(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(**keys)


def _short(data: list[Any]) -> Any:
    return data[:7]


def _wrapped(data: list[Any]) -> Any:
    return data, 4


def _lists(data: list[Any]) -> Any:
    return [*data[:5], list(data[5].values()), *data[6:]]


def _swapped(data: list[Any]) -> Any:
    return [*data[:4], data[5], data[4], *data[6:]]


def _numbers(data: list[Any]) -> Any:
    return [*data[:5], data[4], *data[6:]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_short, "a list of 7 entries as its data set; expected the 8 entries .train_data_num"),
        (_wrapped, "a tuple of 2 entries"),
        (
            _lists,
            "entry 5 of the data set, train_data_local_dict, has the type list; expected a dict",
        ),
        (lambda data: dict(enumerate(data)), "a dict as its data set"),
        (_swapped, "entry 4 .*does not hold numbers of examples"),
        (_numbers, "entry 5 .*holds numbers in the place of data loaders"),
    ],
)
def test_a_data_set_of_another_form_is_told(change: Callable[[list[Any]], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run(data=change(dataset()), **ON)


def test_a_model_that_cannot_be_converted_is_told() -> None:
    with pytest.raises(ConversionError, match="no layer of the model can be factorised"):
        run(net=nn.Sequential(nn.Linear(32, 4)), **ON)
    with pytest.raises(ConversionError, match="got a dict as its model"):
        run(net={"not": "a model"}, **ON)  # type: ignore[arg-type]


def test_keys_may_be_text_and_nothing_is_on_by_itself() -> None:
    args = arguments(
        fedpara_method="fedpara", fedpara_gamma="0.3", fedpara_mend="yes", fedpara_clip="none"
    )
    settings = FedMLSettings.from_args(args)
    assert (settings.config.gamma, settings.mend, settings.config.clip) == (0.3, True, None)
    plain = FedMLSettings.from_args(arguments())
    assert not plain.active
    assert not plain.mend


def test_a_model_that_is_too_small_names_the_key() -> None:
    with pytest.raises(ConversionError, match="fewer than fedpara_min_size="):
        run(net=nn.Sequential(nn.Linear(32, 4)), **ON)


@pytest.mark.parametrize("key", ["ledger", "checkpoint", "client_checkpoints", "state_dir"])
@pytest.mark.parametrize("place", ["under a file", "a folder or a file"])
def test_what_cannot_be_written_is_told_before_the_first_round(
    key: str, place: str, tmp_path: Path
) -> None:
    """Otherwise the end of the training would be the time to learn it."""
    in_the_way = tmp_path / "there"
    if place == "under a file":
        in_the_way.write_text("")
        path = in_the_way / "folder" / "name"
    else:
        in_the_way.mkdir() if key in ("ledger", "checkpoint") else in_the_way.write_text("")
        path = in_the_way
    said = "" if key == "state_dir" else "nothing can be written to "
    with pytest.raises(ConfigError, match=f"fedpara_{key}: {said}{path}[: ]"):
        run(**ON, **{f"fedpara_{key}": str(path)})


def test_trying_leaves_nothing_behind(tmp_path: Path) -> None:
    from fedpara_plugins_fedml.checks.files import check_files

    paths = {f"fedpara_{key}": str(tmp_path / key) for key in ("checkpoint", "state_dir")}
    check_files(FedMLSettings.from_args(arguments(**ON, **paths)), server=True, client=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["state_dir"]


def test_without_an_optimizer_s_name_it_is_fedavg() -> None:
    def without(args: Any) -> list[Any]:
        del args.federated_optimizer
        return dataset()

    torch.testing.assert_close(run(data=without, **ON).state, run(**ON).state)


def test_clients_without_data_to_test_on_are_not_tested(caplog: pytest.LogCaptureFixture) -> None:
    data = dataset()
    data[6] = dict.fromkeys(data[6])
    run(data=data, **ON)
    assert "clients are not tested: none has data for it" in caplog.text


# Two sides that do not agree: a server's message for a client of other settings


def _message_to(server: dict[str, Any], client: dict[str, Any]) -> Head:
    from fedpara_plugins_fedml import FedMLRunner

    halves = [
        FedMLRunner(arguments(**keys), torch.device("cpu"), dataset(), model()).runner
        for keys in (server, client)
    ]
    halves[0].server.begin(["1"])
    data = halves[0].server.message("1")
    own = [halves[1]._dataset[place][1] for place in (5, 6, 4)]
    reply = halves[1].clients.train("1", data, *own)
    try:
        halves[0].server.receive("1", reply)
    finally:
        head = Head.from_json(unpack(reply).head)
    return head


@pytest.mark.parametrize(
    ("server", "client", "words"),
    [
        ({**ON, "fedpara_gamma": 0.1}, {**ON, "fedpara_gamma": 0.5}, "rank"),
        (ON, {"fedpara_mend": True}, "has dense|differs at"),
        ({"fedpara_mend": True}, ON, "differs at"),
        (ON, {"fedpara_method": "pfedpara"}, "pfedpara"),
        (
            {**ON, "fedpara_codec": "small"},
            {**ON, "fedpara_codec": "balanced"},
            r"client has balanced, the server has small\. Set",
        ),
        ({**ON, "fedpara_seed": 1}, {**ON, "fedpara_seed": 2}, "seed"),
        ({"fedpara_private": "4.*"}, {"fedpara_private": "2.*"}, "private"),
    ],
)
def test_two_sides_that_differ_end_the_run_in_the_user_s_terms(
    server: dict[str, Any], client: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=f"client 1: .*({words})"):
        _message_to(server, client)


def test_two_sides_that_agree_do_not() -> None:
    assert _message_to(ON, ON).error == ""


def test_a_message_of_another_purpose_is_not_trained_on() -> None:
    from fedpara_plugins_fedml import FedMLRunner

    inner = FedMLRunner(arguments(**ON), torch.device("cpu"), dataset(), model()).runner
    inner.server.begin(["1"])
    own = [inner._dataset[place][1] for place in (5, 6, 4)]
    reply = inner.clients.train("1", inner.server.message("1", "evaluate"), *own)
    assert "for 'evaluate' came where training was due" in Head.from_json(unpack(reply).head).error


def test_a_server_that_asks_for_what_only_another_optimizer_has_is_told_so() -> None:
    from fedpara_plugins_fedml import FedMLRunner

    inner = FedMLRunner(arguments(**ON), torch.device("cpu"), dataset(), model()).runner
    inner.server.begin(["1"])
    own = [inner._dataset[place][1] for place in (5, 6, 4)]
    reply = inner.clients.train("1", inner.server.message("1", "prepare"), *own)
    head = Head.from_json(unpack(reply).head)
    assert "as Mime does, and this client runs FedAvg; set the same" in head.error
    assert head.fatal


@pytest.mark.parametrize("prefix", ["module", "_orig_mod"])
def test_the_state_of_a_wrapped_model_does_not_leave_the_client(prefix: str) -> None:
    """As of `DataParallel` or `torch.compile`: under such names private factors would be sent."""
    from fedpara_plugins_fedml import FedMLRunner

    keys = {**ON, "fedpara_method": "pfedpara"}
    inner = FedMLRunner(arguments(**keys), torch.device("cpu"), dataset(), model()).runner
    trainer = inner.clients._trainer
    plain = trainer.get_model_params
    trainer.get_model_params = lambda: {f"{prefix}.{k}": v for k, v in plain().items()}
    inner.server.begin(["1"])
    own = [inner._dataset[place][1] for place in (5, 6, 4)]
    envelope = unpack(inner.clients.train("1", inner.server.message("1"), *own))
    assert f"model.{prefix}.state_dict()" in Head.from_json(envelope.head).error
    assert not envelope.payloads


def test_a_users_home_in_a_path_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("ledger.jsonl", "checkpoint", "state_dir", "client_checkpoints")
    run(**ON, **{f"fedpara_{name.split('.')[0]}": f"~/runs/{name}" for name in names})
    assert {path.name for path in (tmp_path / "runs").iterdir()} == set(names)
    assert (tmp_path / "runs" / "client_checkpoints" / "client-0.safetensors").exists()


# Late replies


def test_a_reply_of_another_round_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    replies: list[bytes] = []

    def late(sent: Any) -> bytes:
        if sent.direction == "up" and sent.client == "2":
            replies.append(sent.data)
            return replies[0]
        data: bytes = sent.data
        return data

    run(**ON, client_num_per_round=4, tap=late)
    assert "left out client 2 in round 2: a reply of round 1 in round 2" in caplog.text
