"""A client's own dense model, written where the client lives."""

from __future__ import annotations

from flwr.app import Context, Message

from fedpara_plugins.exchange import ClientRound, own_checkpoint
from fedpara_plugins_flower.client.storage import OUTAGES
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = ["export"]


def export(
    message: Message, context: Context, settings: FlowerSettings, client_round: ClientRound
) -> None:
    """Write the client's own dense model each time it has been evaluated.

    A disk that refuses it costs the file alone.
    """
    folder = settings.client_checkpoints
    if folder is None or not message.metadata.message_type.startswith("evaluate"):
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
