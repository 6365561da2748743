"""Ends a run in its first round if no client of it can work with the plugin, and says why."""

from __future__ import annotations

from collections.abc import Sequence

from flwr.common import Message
from flwr.common.constant import ErrorCode

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins_flower.marker import has_marker
from fedpara_plugins_flower.secagg import is_secagg

__all__ = ["FirstContact"]

ADD_MOD = "Add to the client: app = ClientApp(mods=[fedpara.client_mod]), the mod first in the list"

WITHOUT_MOD = ("fedpara.payload", "fedpara.parameters", "fitins.parameters")
"""Names in the error of an app that has to read an encoded message by itself."""


class FirstContact:
    """Watches replies until one comes from a client that has the plugin.

    An app of its own accord goes on for all its rounds when every client fails, so a set-up that
    cannot work would show itself at the very end.
    """

    def __init__(self) -> None:
        self._met = False
        self._failed: list[Message] = []

    def replied(self, replies: Sequence[Message]) -> None:
        """Take in some replies.

        Raises:
            ConfigError: clients answer without the plugin.
        """
        if self._met:
            return
        self._failed += [reply for reply in replies if reply.has_error()]
        sound = [r for r in replies if not r.has_error() and not is_secagg(r.content)]
        self._met = any(has_marker(reply.content) for reply in replies if not reply.has_error())
        if sound and not self._met:
            raise ConfigError(
                f"fedpara: the clients (node {sound[0].metadata.src_node_id}, for one) answer "
                f"without the plugin, while this run's config turns it on. {ADD_MOD}"
            )

    def check(self) -> None:
        """All replies to the first messages are in: raise if they show that none can be used.

        Clients that fail for reasons of their own are the app's business.

        Raises:
            FedParaError: with the words of the first client that speaks of the plugin.
        """
        if self._met:
            return
        for reply in self._failed:
            node, reason = reply.metadata.src_node_id, reply.error.reason or ""
            all_failed = f"all {len(self._failed)} clients failed at the first message"
            if "fedpara: " in reason:
                raise FedParaError(f"fedpara: {all_failed}. Node {node} said: {reason}")
            if any(name in reason for name in WITHOUT_MOD):
                raise ConfigError(
                    f"fedpara: {all_failed}: their app reads encoded messages without the plugin. "
                    f"{ADD_MOD}. Node {node} said: {reason}"
                )
            if reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION:
                raise ConfigError(
                    f"fedpara: {all_failed}, in a mod. A mod that stands before fedpara.client_mod "
                    f"sees encoded messages: put fedpara.client_mod first in the client's list, "
                    f"ClientApp(mods=[fedpara.client_mod, ...]). Node {node} said: {reason}"
                )
