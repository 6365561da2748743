"""The checks of Flower's cells: with a fault in the adapter, the app or the loop, a cell fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedpara_plugins import Ledger
from fedpara_plugins.codecs import parse_codec
from fedpara_plugins.exchange import ClientState, ReplyReader, client_round
from fedpara_plugins_flower import run as adapter_run
from fedpara_plugins_flower.client import mod as client
from fedpara_plugins_flower.server import accounting, grid, outbox, reply_decoder
from harness.cells.base import Cell
from harness.cells.environments import installed_version
from harness.cells.refusals import refusal
from harness.flower import apps
from harness.matrix.cell_runs import _plain_loop, plain_loop, run
from harness.matrix.checks import check_cell, check_refused
from harness.oracles import rules

Patch = pytest.MonkeyPatch
State = dict[str, Tensor]


def _no_dtype_restored(patch: Patch) -> None:
    patch.setattr(outbox, "cast", lambda value, dtype: value)


def _a_tensor_dropped(patch: Patch) -> None:
    original = client.to_tensors
    patch.setattr(client, "to_tensors", lambda record: dict(list(original(record).items())[:-1]))


def _no_fill_in_on_the_server(patch: Patch) -> None:
    patch.setattr(ReplyReader, "completed", lambda self, record, shared: dict(shared))


def _private_factors_forgotten(patch: Patch) -> None:
    patch.setattr(ClientState, "keep_private", lambda self, spec, tensors: None)


def _private_factors_sent(patch: Patch) -> None:
    from fedpara_plugins.exchange import OwnModels, downlink_encoder
    from fedpara_plugins.references import grid as schemes
    from fedpara_plugins.references import per_client

    patch.setattr(OwnModels, "hidden_names", lambda *given: set())
    for module in (downlink_encoder, per_client, schemes):
        patch.setattr(module, "shared_tensors", lambda spec, tensors: dict(tensors))


def _weights_scaled(patch: Patch) -> None:
    _weights(patch, lambda value: value * 1.01)


def _weights_halved_in_precision(patch: Patch) -> None:
    _weights(patch, lambda value: value.half().float())


def _weights(patch: Patch, change: Callable[[Tensor], Tensor]) -> None:
    original = reply_decoder.averageable

    def changed(tensors: State) -> State:
        return {
            key: change(value) if value.dtype == torch.float32 else value
            for key, value in original(tensors).items()
        }

    patch.setattr(reply_decoder, "averageable", changed)


def _a_stale_model_sent(patch: Patch) -> None:
    original = outbox.Outbox._put

    def stale(self: Any, name: str, record: Any) -> Any:
        self.__dict__.setdefault("first", record)
        return original(self, name, self.first)

    patch.setattr(outbox.Outbox, "_put", stale)


def _a_client_left_out(patch: Patch) -> None:
    original = grid.CodecGrid._received

    def short(self: Any, replies: Any) -> Any:
        usable, lost = original(self, replies)
        return usable[:-1], lost

    patch.setattr(grid.CodecGrid, "_received", short)


def _weights_of_clients_equal(patch: Patch) -> None:
    original = apps.MetricRecord

    def equal(values: dict[str, Any]) -> Any:
        return original({**values, "num-examples": 1} if "train_loss" in values else values)

    patch.setattr(apps, "MetricRecord", equal)


def _bytes_miscounted(patch: Patch) -> None:
    original = accounting.array_bytes
    patch.setattr(accounting, "array_bytes", lambda record: original(record) + 1)


def _evaluations_not_counted(patch: Patch) -> None:
    original = accounting.Accounting._enter

    def enter(self: Any, message: Any, *rest: Any) -> None:
        if message.metadata.message_type != "evaluate":
            original(self, message, *rest)

    patch.setattr(accounting.Accounting, "_enter", enter)


def _another_codec(patch: Patch) -> None:
    original = client_round.encode_record

    def lossy(*args: Any, codec: Any, **kwargs: Any) -> Any:
        return original(*args, codec=parse_codec("int8"), **kwargs)

    patch.setattr(client_round, "encode_record", lossy)


def _seeded_private_factors_on_the_server(patch: Patch) -> None:
    patch.setattr(adapter_run, "zero_private_factors", lambda model: None)


def _integers_left_as_they_are(patch: Patch) -> None:
    patch.setattr(reply_decoder, "averageable", dict)


def _no_refusal_on_the_server(patch: Patch) -> None:
    patch.setattr(grid, "check_clipped_message", lambda message, settings: None)
    patch.setattr(client, "check_clipping_mods", lambda *_: None)


def _no_refusal_on_the_client(patch: Patch) -> None:
    patch.setattr(client, "check_clipping_mods", lambda *_: None)


def _no_proximal_term(patch: Patch) -> None:
    original = apps.train

    def train(model: Any, batches: Any, *, lr: float, proximal_mu: float | None = None) -> float:
        return original(model, batches, lr=lr, proximal_mu=None if proximal_mu is None else 0.0)

    patch.setattr(apps, "train", train)


def _a_wrong_reference(patch: Patch) -> None:
    def wrong(self: Any, server_round: int, current: State, replies: Any) -> State:
        return rules.mean([replace(reply, size=1) for reply in replies])

    patch.setattr(rules.FedAvgRule, "server", wrong)


def _a_reference_that_selects_otherwise(patch: Patch) -> None:
    patch.setattr(
        rules.MultiKrumRule, "server", lambda self, r, x, replies: rules.mean(replies[:3])
    )


FAULTS: list[tuple[Callable[[Patch], None], tuple[str, str, str, str]]] = [
    (_no_dtype_restored, ("fedadam", "fedpara", "none", "groupnorm")),
    (_a_tensor_dropped, ("fedavg", "fedpara", "none", "groupnorm")),
    (_no_fill_in_on_the_server, ("fedavg", "pfedpara", "none", "groupnorm")),
    (_private_factors_forgotten, ("fedavg", "pfedpara", "none", "groupnorm")),
    (_private_factors_sent, ("fedavg", "pfedpara", "none", "groupnorm")),
    (_weights_scaled, ("fedavg", "lowrank", "none", "groupnorm")),
    (_weights_scaled, ("fedmedian", "fedpara", "int8", "groupnorm")),
    (_weights_halved_in_precision, ("fedavg", "none", "lossless", "groupnorm")),
    (_a_stale_model_sent, ("fedavgm", "fedpara", "none", "groupnorm")),
    (_a_client_left_out, ("fedavg", "fedpara", "int8", "groupnorm")),
    (_weights_of_clients_equal, ("fedavg", "fedpara", "none", "groupnorm")),
    (_bytes_miscounted, ("fedavg", "fedpara", "int8", "groupnorm")),
    (_evaluations_not_counted, ("fedavg", "fedpara", "int8", "groupnorm")),
    (_another_codec, ("fedavg", "fedpara", "lossless", "groupnorm")),
    (_seeded_private_factors_on_the_server, ("krum", "pfedpara", "none", "groupnorm")),
    (_integers_left_as_they_are, ("qfedavg", "fedpara", "none", "batchnorm")),
    (_no_refusal_on_the_server, ("dpclientfixed", "fedpara", "int8", "groupnorm")),
    (_no_refusal_on_the_client, ("dpclientfixed", "fedpara", "none", "batchnorm")),
    (_no_proximal_term, ("fedprox", "fedpara", "none", "groupnorm")),
    (_a_wrong_reference, ("fedavg", "fedpara", "none", "groupnorm")),
    (_a_reference_that_selects_otherwise, ("multikrum", "fedpara", "int8", "groupnorm")),
]


@pytest.mark.in_turn(every=3)
@pytest.mark.parametrize(
    ("fault", "row"), FAULTS, ids=[f"{fault.__name__[1:]}-{row[0]}" for fault, row in FAULTS]
)
def test_a_cell_fails_for(
    fault: Callable[[Patch], None], row: tuple[str, str, str, str], tmp_path: Path
) -> None:
    """The same cells pass without the fault: they are among those of the matrix."""
    cell = Cell("flower", "local", *row)
    with pytest.MonkeyPatch.context() as patch:
        _plain_loop.cache_clear()
        fault(patch)
        try:
            # A fault may also end the run with an error, which fails a cell as well.
            with pytest.raises(Exception) as caught:
                _judge(cell, tmp_path / "ledger.jsonl")
        finally:
            _plain_loop.cache_clear()
    assert not isinstance(caught.value, AttributeError | NameError), "the fault itself is broken"
    print(f"{fault.__name__[1:]}: {type(caught.value).__name__}: {str(caught.value)[:100]}")


def _judge(cell: Cell, ledger: Path) -> None:
    expected = refusal(cell, installed_version())
    if expected is not None:
        check_refused(run(cell, ledger, raises=False), expected)
        return
    outcome = run(cell, ledger)
    check_cell(cell, outcome, plain_loop(cell), Ledger.read(ledger))
