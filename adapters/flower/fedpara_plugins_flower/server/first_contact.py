"""A check of the first replies, which ends a run if no client can work with the plugin."""

from __future__ import annotations

import re

from flwr.app import Message

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.support import printable, shortened
from fedpara_plugins_flower.messages.records import carried_payload
from fedpara_plugins_flower.messages.snippets import ADD_MOD
from fedpara_plugins_flower.seams import ERROR_END, LEGACY_REQUESTS, MOD_FAILED

__all__ = ["FirstContact", "reads_payloads"]

WITHOUT_MOD = ("fedpara.payload", LEGACY_REQUESTS["train"])
"""Names in the error of an app that has to read an encoded message by itself."""

OWN = "fedpara: "
"""How the plugin's own errors begin, wherever an engine puts them in its text."""


LONGEST_REASON = 2000
"""Characters of a client's error that are repeated, in one line."""


def reads_payloads(reason: str) -> bool:
    """Return whether a client's error is that of an app which reads encoded messages by itself."""
    return any(name in reason for name in WITHOUT_MOD)


class FirstContact:
    """Watches replies until one can be used.

    An app goes on for all its rounds when every client fails, so a set-up that cannot work would
    show itself at the very end.
    """

    def __init__(self) -> None:
        self._met = False
        self._failed: dict[int, tuple[int, str]] = {}
        self._left_out: dict[int, str] = {}
        self._without: list[int] = []
        self._lengths: set[str] = set()

    def sent(self, message: Message) -> None:
        """Note the lengths of what goes out: whoever stumbles over it may name them."""
        if not self._met:
            payloads = map(carried_payload, message.content.array_records.values())
            self._lengths |= {str(len(payload)) for payload in payloads if payload is not None}

    def failed(self, node: int, code: int, reason: str) -> None:
        """Note a client's error."""
        if not self._met:
            self._failed[node] = code, printable(shortened(reason, LONGEST_REASON))

    def used(self) -> None:
        """Note that a reply has been decoded: from now on, failures are one client's own."""
        self._met = True

    def left_out(self, node: int, reason: str) -> None:
        """Note that a reply could not be used."""
        if not self._met:
            self._left_out[node] = reason

    def without_plugin(self, node: int) -> None:
        """Note that a client answers without the plugin."""
        if not self._met:
            self._without.append(node)

    def check(self) -> None:
        """Raise if the replies to the first messages show that none can be used.

        To be called when all of them are in. Clients that fail for reasons of their own are the
        app's business.

        Raises:
            FedParaError: with the words of the first client that speaks of the plugin.
        """
        if self._met:
            return
        self.check_plugin()
        self._check_errors()
        for node, reason in self._left_out.items():
            raise FedParaError(
                f"fedpara: all {len(self._left_out)} replies to the first message had to be left "
                f"out. Node {node}: {reason}"
            )

    def check_plugin(self) -> None:
        """Raise if all clients that have answered lack the plugin.

        Raises:
            ConfigError: with the line to add.
        """
        if self._without and not self._met and not self._left_out:
            raise ConfigError(
                f"fedpara: the client of node {self._without[0]} answers without the plugin, and "
                f"so do all others. Add to the client: {ADD_MOD}. This run's config turns the "
                f"plugin on"
            )

    def check_first_weights(self) -> None:
        """Raise if the clients that were asked for the first weights gave none that can be used.

        Raises:
            FedParaError: why those of the first one cannot be used.
        """
        self.check_plugin()
        for node, reason in self._left_out.items():
            raise FedParaError(f"fedpara: the first weights, of node {node}: {reason}")

    @property
    def met(self) -> bool:
        """Whether a reply has been decoded."""
        return self._met

    def _check_errors(self) -> None:
        """Raise if the clients' errors speak of the plugin."""
        all_failed = f"all {len(self._failed)} clients failed at the first message"
        for node, (code, reason) in self._failed.items():
            if OWN in reason:
                said = reason[reason.index(OWN) :].removesuffix(ERROR_END)
                raise FedParaError(f"fedpara: {all_failed}. Node {node} said: {said}")
            if reads_payloads(reason):
                raise ConfigError(
                    f"fedpara: the client of node {node} reads encoded messages without the "
                    f"plugin. Add to the client: {ADD_MOD}. {all_failed.capitalize()}; this one "
                    f"said: {reason}"
                )
            stumbled = not self._lengths.isdisjoint(re.findall(r"\d+", reason))
            if stumbled or code == MOD_FAILED:
                raise ConfigError(
                    f"fedpara: {all_failed}, in their app or in a mod that reads encoded messages. "
                    f"What stands before fedpara.client_mod in the client's list sees those. "
                    f"Change in the client: {ADD_MOD}, before clipping or noise. Node {node} said: "
                    f"{reason}"
                )
