"""A client's own dense model, written where the client lives."""

from __future__ import annotations

from flwr.app import Context, Message

from fedpara_plugins.exchange import ClientRound, close_own_checkpoints, own_checkpoint
from fedpara_plugins_flower.client.storage import OUTAGES
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = ["export"]


def export(
    message: Message, context: Context, settings: FlowerSettings, client_round: ClientRound
) -> None:
    """Write the client's own dense model each time it has been evaluated.

    Earlier ones are closed to other users. A disk that refuses it costs the file alone.
    """
    folder = settings.client_checkpoints
    if folder is None:
        return
    try:
        close_own_checkpoints(folder)
    except OSError as error:
        OUTAGES.note("the mode of a client's checkpoint", folder, error, "training goes on")
    if not message.metadata.message_type.startswith("evaluate"):
        return
    who = context.node_config.get("partition-id", context.node_id)
    for part in client_round.models[:1]:
        own_checkpoint(
            folder,
            str(who),
            part.spec.dense_state(part.full),
            method=settings.config.method,
            outages=OUTAGES,
        )
