"""The server's half of a run: what is sent to whom, what comes back, and the next state."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fedpara_plugins import MismatchError, ModelSpec, PayloadError
from fedpara_plugins.codecs import decode_payload
from fedpara_plugins.exchange import Outbox, Size, check_finite, size_of
from fedpara_plugins.models import save_dense
from fedpara_plugins.optimizers import trained_parameters
from fedpara_plugins_fedml.engine.accounting import Accounting
from fedpara_plugins_fedml.engine.aggregation import Aggregation
from fedpara_plugins_fedml.engine.answers import Answers
from fedpara_plugins_fedml.engine.models import dense_of, no_model, plain_state, spec_for, to_state
from fedpara_plugins_fedml.engine.server_state import CompletedRound, ServerFile
from fedpara_plugins_fedml.messages.envelope import Envelope, pack, unpack
from fedpara_plugins_fedml.messages.head import MODEL, Head, Purpose
from fedpara_plugins_fedml.rules import ClientReply as Answer
from fedpara_plugins_fedml.rules import Rule, State
from fedpara_plugins_fedml.settings import FedMLSettings as Settings

__all__ = ["ServerHalf"]

log = logging.getLogger("fedpara.fedml")


class ServerHalf:
    """One server, whatever carries its messages.

        server.begin(["3", "5"])
        for client in ["3", "5"]:
            reply = ...(server.message(client, "train"))     # the transport
            server.receive(client, reply)                    # FedParaError: server.exclude(...)
        server.end()

    Args:
        settings: of the run.
        args: FedML's; its ``round_idx`` is kept up to date, as FedML's own servers do.
        device: FedML's.
        dataset: FedML's eight entries.
        aggregator: the user's ServerAggregator or FedML's default; its model is converted.
        rule: of the optimizer.

    Attributes:
        round: the current one, 1 for the first; 0 before it.
        accounting: of the run.
    """

    def __init__(
        self,
        settings: Settings,
        args: Any,
        device: torch.device,
        dataset: Sequence[Any],
        aggregator: Any,
        rule: Rule,
    ) -> None:
        self.settings = settings
        self.rule = rule
        self.round = 0
        self.accounting = Accounting(settings.ledger, settings.config)
        self._args = args
        self._device = device
        self._dataset = dataset
        self._aggregator = aggregator
        self._x = to_state(aggregator.get_model_params())
        self._spec = spec_for(aggregator.model, self._x)
        rule.trained = frozenset(trained_parameters(aggregator.model)) & self._x.keys()
        self._aggregation = Aggregation(aggregator, args, self._spec)
        self._outbox = Outbox(settings)
        self._answers = Answers(0, ())
        self._fresh = 0
        self._file = ServerFile(settings.state_dir)
        self._go_on()

    def _go_on(self) -> None:
        """Where an earlier process was killed, after its last complete round."""
        saved = self._file.read(self._completed())
        if saved is None:
            return
        self.round, self._x = saved.round, saved.x
        self.rule.load_state_dict(saved.rule)
        self._aggregator.set_model_params(plain_state(self._x))
        log.info(
            "fedpara: %s holds round %d of %d: the run goes on after it. For a new run choose "
            "another fedpara_state_dir",
            self.settings.state_dir, self.round, self._args.comm_round,
        )  # fmt: skip

    def _completed(self) -> CompletedRound:
        method = self.settings.config.method
        described = f"method {method} (fingerprint {self._spec.fingerprint})"
        return CompletedRound(
            round=self.round,
            x=self._x,
            rule=self.rule.state_dict(),
            optimizer=self.rule.name,
            model=described if self._spec.weights else "",
        )

    @property
    def state(self) -> State:
        """The server's state: all names, private factors at zero. Not to be changed."""
        return self._x

    @property
    def spec(self) -> ModelSpec:
        """The model that the state belongs to."""
        return self._spec

    # A round

    def begin(self, clients: Sequence[str]) -> None:
        """Start the next round with these clients.

        Where the rule ``prepares``, messages of that purpose come first, then `end_preparation`.
        """
        self.round += 1
        self._args.round_idx = self.round - 1
        self._answers = Answers(self.round, clients)
        self._fresh = 0
        self.rule.begin(self.round, self._x, self._answers.asked)
        self._put()

    def _put(self) -> None:
        self._outbox.put(MODEL, self._x, self._spec)
        for name, tensors in self.rule.records().items():
            self._outbox.put(name, dict(tensors), no_model(tensors), sized_as=self._spec)

    def message(self, client: str, purpose: Purpose = "train") -> bytes:
        """The message for one client, coded against what that client holds.

        Args:
            client: its name.
            purpose: ``train``; ``prepare``, where the rule `prepares`; or ``evaluate``, which
                hands out the model and asks for no answer.
        """
        records = [MODEL, *self.rule.records()] if purpose == "train" else [MODEL]
        task = dict(self.rule.task(client))
        head = Head(round=self.round, purpose=purpose, task=task)
        payloads = {name: self._outbox.encode(client, name) for name in records}
        data = pack(head.to_json(), payloads)
        self.accounting.describe_layers(lambda: self._outbox.layers(MODEL))
        size = sum((self._outbox.size(name) for name in records), Size())
        self.accounting.message(self.round, "down", client, data, size, kind=purpose)
        return data

    def receive(self, client: str, data: object) -> bool:
        """Take a client's reply.

        Returns:
            False if the client has lost what the message was coded against, and did nothing: the
            next `message` for it will suit it.

        Raises:
            ConfigError: the client says that the two sides are set up differently, or that an
                option of its own is wrong: no round can succeed.
            FedParaError: the reply cannot be used: `exclude` the client.
        """
        size, head = Size(), Head(round=self.round)
        try:
            envelope = unpack(data)
            head = Head.from_json(envelope.head)
            if head.round != self.round:
                raise MismatchError(f"a reply of round {head.round} in round {self.round}")
            if head.lost:
                self._outbox.refused(client, head.has)
                return False
            head.raise_error(client)
            size = self._take(client, head, envelope)
            return True
        finally:
            if isinstance(data, bytes):
                self.accounting.message(self.round, "up", client, data, size, kind=head.purpose)

    def _take(self, client: str, head: Head, envelope: Envelope) -> Size:
        self._answers.check_awaited(client)
        size = Size()
        records: dict[str, State] = {}
        for name, payload in envelope.payloads.items():
            decoded = decode_payload(
                payload,
                references=self._outbox.references,
                limit=self._outbox.limit(name),
            ).tensors
            check_finite(decoded)
            size += size_of(decoded, self._spec)
            records[name] = decoded
        if not 0 < head.examples < float("inf"):
            raise PayloadError(f"the reply names {head.examples} training examples")
        model = records.pop(MODEL, None)
        if head.purpose == "train" and model is None:
            raise PayloadError("the reply holds no model")
        state = self._x if model is None else self._outbox.completed(MODEL, model)
        received = self._outbox.references.get(head.holds.get(MODEL, ""))
        self._answers.take(Answer(client, head.examples, state, records, head.report, received))
        self._fresh += head.fresh
        self._outbox.acknowledge(client, head.holds, head.decoders)
        return size

    def exclude(self, client: str, reason: object) -> None:
        """Leave a client out of this round, with a line in the log that names it."""
        self._answers.exclude(client, reason)

    def end_preparation(self) -> None:
        """All that were asked to prepare have answered or are excluded: training may begin."""
        self.rule.prepared(self._answers.enough(self.settings.min_clients))
        self._answers.forget()
        self._put()

    def end(self) -> None:
        """Aggregate what came back: the round is over.

        Raises:
            FedParaError: fewer usable answers than ``fedpara_min_clients``.
        """
        answers = self._answers.enough(self.settings.min_clients)
        if self._fresh and self._spec.private_keys:
            log.info("fedpara: %d clients started from the seeded private factors", self._fresh)
        self._outbox.tell_first_contacts()
        self._x = self._aggregation.next_state(self._x, answers, self.rule)
        self._aggregator.set_model_params(plain_state(self._x))
        self._file.write(self._completed())
        self.accounting.log_round(self.round)

    def tests_itself(self) -> bool:
        """Whether the user's aggregator has tested all clients, as in FedML's other modes."""
        (_, _, _, _, _, train, test, _) = self._dataset
        return bool(self._aggregator.test_all(train, test, self._device, self._args))

    # The end

    def put_final(self) -> None:
        """The next messages carry the state after the last round."""
        self._put()

    def close(self) -> None:
        """The run is over: say what it cost, and write the dense checkpoint."""
        self.accounting.log_run()
        self._outbox.close()

    def save_checkpoint(self) -> None:
        """Write the server's dense model, where ``fedpara_checkpoint`` is set."""
        path = self.settings.checkpoint
        if path is None:
            return
        model = "the server's model"
        if self._spec.private_factors:
            model += ": W1, the shared part (private part zero)"
        dense = dense_of(self._aggregator.model, self._x, private=False)
        save_dense(path, dense, model=model, method=self.settings.config.method)
        log.info("fedpara: dense checkpoint of the server's model written to %s", path)
