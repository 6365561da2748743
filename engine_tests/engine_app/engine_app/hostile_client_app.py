"""The client side where some nodes are hostile, and some lack the plugin's mod.

``FEDPARA_HOSTILE`` (JSON) has, by partition, names of attacks, one a round; ``""`` stands for a
client without the mod.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from flwr.app import Context, Message

import fedpara_plugins_flower as fedpara
from engine_app import client_app
from engine_app.noted_app import NotedClientApp
from harness.flower.hostile import HOSTILE, tampering

App = Callable[[Message, Context], Message]
Mod = Callable[[Message, Context, App], Message]

PLAN = json.loads(os.environ["FEDPARA_HOSTILE"])


def plugin(message: Message, context: Context, call_next: App) -> Message:
    """Run the plugin's mod, with an attack in front of it, or neither."""
    client = str(context.node_config["partition-id"])
    names = PLAN.get(client)
    if names == "":
        return without(message, context, call_next)

    def honest(message: Message, context: Context) -> Message:
        return fedpara.client_mod(message, context, call_next)

    if names is None:
        return honest(message, context)
    attacks = [HOSTILE[name][0] if name in HOSTILE else OWN[name] for name in names]
    hostile: Mod = tampering(attacks, int(client))
    return hostile(message, context, honest)


def without(message: Message, context: Context, call_next: App) -> Message:
    """Stand for a client without the mod."""
    return call_next(message, context)


def _raise(reply: Message) -> None:
    raise RuntimeError("the disk is full")


def _take_no_message(reply: Message) -> None:
    """Let what is sent pass the SuperLink's checks, and be no message that Flower can rebuild."""
    vars(reply)["deflate"] = lambda: b"Message  4\0junk"


OWN = {"an app that raises": _raise, "no message": _take_no_message}


app = NotedClientApp(mods=[plugin])
app.train()(client_app.fit)
app.evaluate()(client_app.score)
