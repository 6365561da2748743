"""Messages in a run's ledger."""

from __future__ import annotations

import logging

from fedpara_plugins import Ledger
from fedpara_plugins.exchange import RunAccounting, Size
from fedpara_plugins.ledger import LayerSize, read_lines


def layer(name, tensors, raw, dense):
    return LayerSize(layer=name, tensors=tensors, raw_bytes=raw, dense_bytes=dense)


LOG = logging.getLogger("fedpara.test_accounting")


def test_messages_are_entered_as_they_are(tmp_path, helpers):
    path = tmp_path / "ledger.jsonl"
    config = helpers.settings_of(method="fedpara", codec="int8", downlink_codec="none").config
    accounting = RunAccounting(path, config, LOG)
    accounting.message(2, "up", "7", Size(3, 100, 400), encoded=30, kind="evaluate")
    accounting.message(2, "down", "8", Size(1, 10, 40), encoded=5)
    first, *_ = read_lines(path)
    assert (first.method, first.codec) == ("fedpara", "up int8, down none")
    up, down = Ledger.read(path)
    assert (up.round, up.kind, up.direction, up.client) == (2, "evaluate", "up", "7")
    assert (up.tensors, up.raw_bytes, up.encoded_bytes, up.dense_bytes) == (3, 100, 30, 400)
    assert (down.kind, down.direction, down.encoded_bytes) == ("train", "down", 5)


def test_layers_are_described_once_and_added_up(tmp_path):
    path = tmp_path / "ledger.jsonl"
    accounting = RunAccounting(path, None, LOG)
    layers = [layer("fc", 1, 4, 40), layer("head", 1, 8, 8), layer("fc", 2, 6, 0)]
    accounting.describe_layers(lambda: layers)
    accounting.describe_layers(lambda: layers)
    assert list(read_lines(path)) == [layer("fc", 3, 10, 40), layer("head", 1, 8, 8)]


def test_without_a_file_nobody_asks_for_the_layers():
    def layers():
        raise AssertionError("asked for")

    RunAccounting(None, None, LOG).describe_layers(layers)


def test_rounds_and_the_run_are_told_to_the_adapters_log(caplog):
    accounting = RunAccounting(None, None, LOG)
    with caplog.at_level(logging.INFO, LOG.name):
        accounting.log_round(1)
        accounting.message(1, "up", "7", Size(3, 100, 400), encoded=30)
        accounting.log_round(1)
        accounting.log_run()
    lines = [record.getMessage() for record in caplog.records if record.name == LOG.name]
    assert len(lines) == 2
    assert lines[0].startswith("fedpara: round 1")
