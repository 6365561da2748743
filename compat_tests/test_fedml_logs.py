"""The plugin's lines appear where FedML's own do."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("fedml", reason="FedML's environments only")

from fedpara_plugins_fedml.logs import LOGGERS, show_among_fedml_logs


def test_lines_follow_the_logger_that_fedml_puts_in_the_place_of_the_root(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in LOGGERS:
        ours = logging.getLogger(name)
        monkeypatch.setattr(ours, "parent", ours.parent)
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    replaced = logging.getLogger("a-path-of-fedml")
    replaced.addHandler(handler)
    replaced.setLevel(logging.INFO)
    show_among_fedml_logs()
    logging.getLogger("fedpara.fedml").info("before")
    monkeypatch.setattr(logging, "root", replaced)
    show_among_fedml_logs()
    logging.getLogger("fedpara.fedml").info("after")
    assert seen == ["after"]
