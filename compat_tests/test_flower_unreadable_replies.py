"""One changed SuperNode of four sends what Flower's own Grid cannot read: the round goes on.

The replies are pulled and rebuilt by Flower's code for a deployment; see `PullingGrid`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from flwr.app import ArrayRecord, Message, RecordDict

from harness.flower.apps import Outcome, captured_log
from harness.flower.inprocess_grid import InProcessGrid
from harness.flower.pulling_grid import Objects, PullingGrid
from test_flower_hostile_replies import CULPRIT, SECTION, TASK, message_apps

Spoil = Callable[[Message, Objects], None]


def record(objects: Objects, kind: str) -> str:
    """Return the id of the first object of a kind."""
    return next(key for key, content in objects.items() if content.startswith(kind.encode()))


def root(content: bytes) -> Spoil:
    """Replace the message itself."""

    def spoil(reply: Message, objects: Objects) -> None:
        objects[reply.object_id] = content

    return spoil


def part(kind: str, change: Callable[[bytes], bytes]) -> Spoil:
    """Change the first object of a kind."""

    def spoil(reply: Message, objects: Objects) -> None:
        key = record(objects, kind)
        objects[key] = change(objects[key])

    return spoil


def missing(reply: Message, objects: Objects) -> None:
    del objects[record(objects, "ArrayRecord")]


def forged(name: str, value: Any) -> Spoil:
    """Let the message say something else of itself than the SuperLink was told."""

    def spoil(reply: Message, objects: Objects) -> None:
        key, before = reply.object_id, getattr(reply.metadata, name)
        vars(reply.metadata)[f"_{name}"] = value
        objects[key] = reply.deflate()
        vars(reply.metadata)[f"_{name}"] = before

    return spoil


def looped(reply: Message, objects: Objects) -> None:
    """Name the record as its own child."""
    key = record(objects, "RecordDict")
    body = objects[key].partition(b"\0")[2]
    objects[key] = f"RecordDict {key} {len(body)}\0".encode() + body


SPOILS: dict[str, tuple[Spoil, str]] = {
    "no object at all": (root(b"junk"), "Flower cannot read it"),
    "an empty object": (root(b""), "Flower cannot read it"),
    "an unknown class": (root(b"Nothing  0\0"), "KeyError"),
    "another class": (root(bytes(RecordDict().deflate())), "got RecordDict"),
    "a record in its place": (root(bytes(ArrayRecord().deflate())), "got ArrayRecord"),
    "no names": (part("RecordDict", lambda c: c[:-3] + b"}}}"), "Flower cannot read it"),
    "half an array": (part("ArrayRecord", lambda c: c[: len(c) // 2]), "Flower cannot read it"),
    "a child of another class": (
        part("ArrayRecord", lambda c: b"Array" + c[len("ArrayRecord") :]),
        "Flower cannot read it",
    ),
    "a missing object": (missing, "Flower cannot read it"),
    "a loop": (looped, "Flower cannot read it"),
    "another request": (forged("reply_to_message_id", "f" * 64), "reply_to_message_id"),
    "another sender": (forged("src_node_id", 7), "src_node_id"),
}


def run(spoil: Spoil) -> Outcome:
    """Run one round in which the culprit's SuperNode changes its reply."""
    apps = message_apps(rounds=1)
    grid = InProcessGrid(apps.client, nodes=apps.clients, run_config=SECTION)
    culprit = grid.node_id(CULPRIT)

    def spoiled(reply: Message, objects: Objects) -> None:
        if reply.metadata.src_node_id == culprit:
            spoil(reply, objects)

    outcome = Outcome(grid)
    with captured_log() as outcome.log:
        grid.serve(apps.server(outcome), SECTION, PullingGrid(grid, spoiled))
    return outcome


@pytest.mark.parametrize("name", SPOILS)
def test_a_reply_that_flower_cannot_read_is_left_out_and_named(name: str) -> None:
    spoil, says = SPOILS[name]
    outcome = run(spoil)
    lines = [line for line in outcome.log if "left out" in line]
    assert len(lines) == 1, lines
    assert f"node {outcome.grid.node_id(CULPRIT)}" in lines[0]
    assert re.search(says, lines[0]), lines[0]
    assert lines[0].isprintable()
    assert len(lines[0]) < 700
    assert any(f"Received {TASK.clients - 1} results" in line for line in outcome.log)


def test_honest_replies_come_through_as_they_are() -> None:
    outcome = run(lambda reply, objects: None)
    assert not [line for line in outcome.log if "left out" in line]
    assert any(f"Received {TASK.clients} results and 0 fail" in line for line in outcome.log)
