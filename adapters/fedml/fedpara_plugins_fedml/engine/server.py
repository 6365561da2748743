"""The server's side of a run: what is sent to whom, what comes back, and the next state."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from fedpara_plugins import FedParaError, MismatchError, ModelSpec, PayloadError
from fedpara_plugins.exchange import (
    DownlinkEncoder,
    ReplyReader,
    RunAccounting,
    Size,
    check_hashes,
    examples_of,
    frozen_record,
    plain_spec,
    reason_of,
    server_checkpoint,
)
from fedpara_plugins.optimizers import trained_parameters
from fedpara_plugins_fedml.engine.aggregation import Aggregation
from fedpara_plugins_fedml.engine.models import (
    buffers_of,
    check_names_for,
    dense_of,
    frozen_of,
    plain_state,
    spec_for,
    to_state,
)
from fedpara_plugins_fedml.engine.replies import Replies
from fedpara_plugins_fedml.engine.server_state import CompletedRound, ServerFile
from fedpara_plugins_fedml.messages.envelope import Envelope, pack, unpack
from fedpara_plugins_fedml.messages.head import MODEL, Head, Purpose
from fedpara_plugins_fedml.rules import ClientReply, Rule, State
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["ServerEngine"]

log = logging.getLogger("fedpara.fedml")


class ServerEngine:
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
        settings: FedMLSettings,
        args: Any,
        device: torch.device,
        dataset: Sequence[Any],
        aggregator: Any,
        rule: Rule,
    ) -> None:
        self.settings = settings
        self.rule = rule
        self.round = 0
        self.accounting = RunAccounting(settings.ledger, settings.config, log)
        self._outages = self.accounting.outages
        self._failure: FedParaError | None = None
        self._args = args
        self._device = device
        self._dataset = dataset
        self._aggregator = aggregator
        self._x = to_state(aggregator.get_model_params())
        self._spec = spec_for(aggregator.model, self._x)
        check_names_for(rule.name, aggregator.model, self._x)
        self._frozen = frozen_of(aggregator.model, self._x)
        self._buffers = buffers_of(aggregator.model, self._x)
        rule.trained = frozenset(trained_parameters(aggregator.model)) & self._x.keys()
        self._aggregation = Aggregation(aggregator, args, self._spec)
        self._encoder = DownlinkEncoder(settings, self._outages)
        self._replies = Replies(0, ())
        self._purposes: dict[str, Purpose] = {}
        self._fresh = 0
        self._file = ServerFile(settings.state_dir, self._outages)
        self._go_on()

    def _go_on(self) -> None:
        """Go on after the last complete round of a process that was killed."""
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
        self._replies = Replies(self.round, clients)
        self._purposes = {}
        self._fresh = 0
        self.rule.begin(self.round, self._x, self._replies.asked)
        self._put()

    def _put(self) -> None:
        self._encoder.put(MODEL, self._x, self._spec, frozen=self._frozen, buffers=self._buffers)
        self._x = dict(self._encoder.content(MODEL))  # frozen tensors without an average's rounding
        for name, tensors in self.rule.records().items():
            self._encoder.put(name, dict(tensors), plain_spec(tensors), sized_as=self._spec)

    def message(self, client: str, purpose: Purpose = "train") -> bytes:
        """Return the message for one client, coded against what that client holds.

        Args:
            client: its name.
            purpose: ``train``; ``prepare``, where the rule `prepares`; or ``evaluate``, which
                hands out the model and asks for no answer.
        """
        self._purposes[client] = purpose
        records = [MODEL, *self.rule.records()] if purpose == "train" else [MODEL]
        task = dict(self.rule.task(client))
        head = Head(round=self.round, purpose=purpose, task=task)
        payloads = self._encoder.encode_all(client, records)
        once = self._encoder.frozen_payload(client, MODEL)
        if once is not None:
            payloads[frozen_record(MODEL)] = once
        data = pack(head.to_json(), payloads)
        self.accounting.describe_layers(lambda: self._encoder.layers(MODEL))
        size = sum((self._encoder.size(name) for name in records), Size())
        if once is not None:
            size += self._encoder.frozen_size(MODEL)
        self.accounting.message(self.round, "down", client, size, encoded=len(data), kind=purpose)
        return data

    def receive(self, client: str, data: object) -> bool:
        """Take a client's reply, whose sender is not trusted.

        Returns:
            False if the client has lost what the message was coded against, and did nothing: the
            next `message` for it will suit it.

        Raises:
            FedParaError: the reply cannot be used, whatever the reason: `exclude` the client. It is
                a ConfigError if the client says that the two sides are set up differently, or that
                an option of its own is wrong.
        """
        head, reader = Head(round=self.round), self._reader()
        try:
            envelope = unpack(data)
            head = Head.from_json(envelope.head)
            self._check(client, head)
            if head.lost:
                self._encoder.note_refusal(client, head.has)
                self._encoder.note_lacking(client, head.lacks)
                return False
            if head.error:
                self._encoder.note_failure(client)
            head.raise_error(client)
            self._take(client, head, reader, envelope)
            return True
        except FedParaError:
            raise
        except Exception as error:  # whatever it is, it is this reply's alone
            raise reason_of(error) from error
        finally:
            if isinstance(data, bytes):
                self.accounting.message(
                    self.round, "up", client, reader.size, encoded=len(data), kind=head.purpose
                )

    def _reader(self) -> ReplyReader:
        return ReplyReader(
            self._encoder,
            kind_of=lambda record: "model" if record == MODEL else "side",
            model_of=lambda tensors: self._spec,
            strict=True,
            asked=self.rule.reply_records,
            own=False,
        )

    def _check(self, client: str, head: Head) -> None:
        """Raise unless a reply answers the message that this client was sent."""
        if head.round != self.round:
            raise MismatchError(f"a reply of round {head.round} in round {self.round}")
        self._replies.check_awaited(client)
        asked = self._purposes.get(client)
        if head.purpose != asked:
            raise MismatchError(f"it answers to {head.purpose!r}, and was asked to {asked!r}")
        records = len(self._encoder.records)
        check_hashes(head.holds, head.has, head.decoders, records=records)

    def _take(self, client: str, head: Head, reader: ReplyReader, envelope: Envelope) -> None:
        examples = examples_of(head.examples)
        read = reader.read_all(envelope.payloads)
        model = read.pop(MODEL, None)
        if head.purpose == "train" and model is None:
            raise PayloadError("the reply holds no model")
        state = self._x if model is None else model.state
        records = {name: record.state for name, record in read.items()}
        holds = {**reader.references, **head.holds}
        received = reader.received(MODEL, holds.get(MODEL, ""))
        reply = ClientReply(client, examples, state, records, head.report, received)
        self._replies.take(reply, model)
        self._fresh += head.fresh
        self._encoder.acknowledge(client, holds, head.decoders)

    def exclude(self, client: str, reason: object) -> None:
        """Leave a client out of this round, with a line in the log that names it."""
        self._replies.exclude(client, reason)

    def end_preparation(self) -> None:
        """End what goes before training: all that were asked have answered or are excluded."""
        self.rule.prepared(self._replies.enough(self.settings.min_clients))
        self._replies.forget()
        self._put()

    def end(self) -> None:
        """End the round: aggregate what came back.

        Raises:
            FedParaError: fewer usable answers than ``fedpara_min_clients``.
        """
        self._replies.name_outliers(self.settings.outliers)
        replies = self._replies.enough(self.settings.min_clients)
        if self._fresh and self._spec.private_keys:
            log.info("fedpara: %d clients started from the seeded private factors", self._fresh)
        self._encoder.log_first_contacts()
        self._x = self._aggregation.next_state(self._x, replies, self.rule)
        self._aggregator.set_model_params(plain_state(self._x))
        self._file.write(self._completed())
        self.accounting.log_round(self.round)

    def tests_itself(self) -> bool:
        """Return whether the user's aggregator tests all clients, as in FedML's other modes."""
        (_, _, _, _, _, train, test, _) = self._dataset
        return bool(self._aggregator.test_all(train, test, self._device, self._args))

    # The end

    def put_final(self) -> None:
        """Let the next messages carry the state after the last round."""
        self._put()

    def close(self) -> None:
        """End the run: log what it cost, and what could not be written."""
        self.accounting.log_run()
        self._encoder.close()
        self._outages.log_last_line()

    def save_checkpoint(self) -> None:
        """Write the server's dense model, where ``fedpara_checkpoint`` is set."""
        path = self.settings.checkpoint
        if path is None:
            return
        model = "the server's model"
        if self._spec.private_factors:
            model += ": W1, the shared part (private part zero)"
        self._failure = server_checkpoint(
            path,
            dense_of(self._aggregator.model, self._x, private=False),
            model=model,
            method=self.settings.config.method,
            log=log,
            outages=self._outages,
        )

    def raise_failure(self) -> None:
        """Raise an error if the checkpoint could not be written; when all else is done.

        Raises:
            FedParaError: it names the place of the model.
        """
        if self._failure is not None:
            raise self._failure
