"""The options of a client: what the run says, within what the operator and this run so far keep."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message

from fedpara_plugins.exchange import plain_spec
from fedpara_plugins_flower.client.storage import client_state, client_storage, state_file
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = ["check_plain_message", "client_settings"]

KEPT = "fedpara-options"
"""Name of a record in ``Context.state``: the options about privacy of this run's first message."""


def client_settings(context: Context, options: Mapping[str, Any]) -> FlowerSettings:
    """Return the options for one message.

    Each message brings the run's config. One that says less about privacy than the first is
    refused: the app may still hold private values in a model that it built then.

    Args:
        context: of the message; the options about privacy are kept in it.
        options: those of `client_mod_with`.

    Raises:
        ConfigError: see `FlowerSettings.of_client`.
    """
    record = context.state.config_records.get(KEPT)
    kept: dict[str, Any] = {} if record is None else json.loads(str(record["options"]))
    settings = FlowerSettings.of_client(
        context.run_config, options, {"this run so far": kept}, context.node_config
    )
    config = settings.config
    found = {
        "method": config.method,
        "private": list(config.private),
        "overrides": [[pattern, list(map(list, rows))] for pattern, rows in config.overrides],
        "exclude": list(config.exclude),
        "include": list(config.include),
        "min_size": config.min_size,
        "private_head": config.private_head,
        "label_prior": config.label_prior,
    }
    if settings.hides and found != kept:
        context.state[KEPT] = ConfigRecord({"options": json.dumps(found)})
    return settings


def check_plain_message(message: Message, context: Context, state_dir: Path | None) -> None:
    """Raise if a run without the plugin would share what this client keeps private.

    Args:
        message: of the run.
        context: of the message.
        state_dir: where the client keeps its state, if the operator or the run has set it.

    Raises:
        ConfigError: names the tensor, and what to do.
    """
    if (
        state_dir is None
        or not message.has_content()
        or not state_file(context, state_dir).exists()
    ):
        return
    with contextlib.closing(client_storage(context, state_dir)) as storage:
        state = client_state(context, state_dir, storage)
        for record in message.content.array_records.values():
            state.check_still_private(plain_spec(record))
