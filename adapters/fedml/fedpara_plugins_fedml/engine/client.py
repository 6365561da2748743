"""The clients' half of a run: decode, train with the user's trainer, encode.

What else is done with their models, tests and exports, is in `client_models`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fedpara_plugins import ConfigError, ConversionError, FedParaError, MismatchError
from fedpara_plugins.codecs import decoders
from fedpara_plugins.exchange import ClientState, DenseRound, check_finite
from fedpara_plugins.references import LostReferenceError
from fedpara_plugins.support import Part, Storage
from fedpara_plugins.training import start_round, training_of
from fedpara_plugins_fedml.engine.client_models import ClientModels
from fedpara_plugins_fedml.engine.labels import count_once
from fedpara_plugins_fedml.engine.models import plain_state, to_state
from fedpara_plugins_fedml.engine.tasks import Task, encoded
from fedpara_plugins_fedml.messages.envelope import Envelope, pack, unpack
from fedpara_plugins_fedml.messages.head import MODEL, Head
from fedpara_plugins_fedml.rules import LocalRound as Visit
from fedpara_plugins_fedml.rules import LocalRule, State
from fedpara_plugins_fedml.rules import ReplyExtras as LocalWork
from fedpara_plugins_fedml.seams import local_dp_is_on
from fedpara_plugins_fedml.settings import FedMLSettings as Settings

__all__ = ["ClientHalf"]

log = logging.getLogger("fedpara.fedml")

FATAL = (ConfigError, ConversionError, MismatchError)
"""No other round will mend them."""


class ClientHalf(ClientModels):
    """All clients of a process, one after the other.

    Args:
        settings: of the run.
        args: FedML's; its ``round_idx`` is kept up to date.
        device: FedML's.
        trainer: the user's ClientTrainer or FedML's default; its model is converted, or plain where
            clients train dense.
        local_rule: of the optimizer.
        factors: the same model, converted; None for the trainer's own.
    """

    def __init__(
        self,
        settings: Settings,
        args: Any,
        device: torch.device,
        trainer: Any,
        local_rule: LocalRule,
        factors: nn.Module | None = None,
    ) -> None:
        super().__init__(settings, args, device, trainer, factors)
        self._rule = local_rule

    # Training

    def train(
        self,
        client: str,
        data: object,
        train_data: Any,
        test_data: Any,
        examples: float,
        *,
        loaded: Callable[[], None] | None = None,
    ) -> bytes:
        """Answer a message that asks for training, or for what goes before it (`Rule.prepares`).

        Whatever goes wrong here is said in the reply: the server leaves this client out, or ends
        the run. What the client keeps changes when the reply is complete, and not before.

        Args:
            client: its name, the index of its data set.
            data: the message.
            train_data: the client's own, FedML's loader.
            test_data: likewise.
            examples: number of its training examples.
            loaded: called when the trainer holds the model, before it trains.
        """
        head, envelope = Head(round=0), Envelope()
        with contextlib.closing(self._storages.open(client)) as storage:
            try:
                envelope = unpack(data)
                head = Head.from_json(envelope.head)
                return self._trained(
                    client, head, envelope, storage, (train_data, test_data, examples), loaded
                )
            except LostReferenceError as error:
                log.warning("fedpara: the server is asked to send again: %s", error)
                return self._lost(head, envelope, storage)
            except Exception as error:
                fatal = isinstance(error, FATAL)
                log.log(
                    logging.ERROR if fatal else logging.WARNING,
                    "fedpara: client %s has no answer in round %d: %s", client, head.round, error,
                    exc_info=not isinstance(error, FedParaError),
                )  # fmt: skip
                return pack(head.failed(error, fatal=fatal).to_json(), {})

    def _trained(
        self,
        client: str,
        head: Head,
        envelope: Envelope,
        storage: Storage,
        data: tuple[Any, Any, float],
        loaded: Callable[[], None] | None,
    ) -> bytes:
        if head.purpose not in ("train", "prepare"):
            raise MismatchError(f"a message for {head.purpose!r} came where training was due")
        train_data, test_data, examples = data
        self._args.round_idx = head.round - 1
        kept = ClientState(storage, client)
        task = self._task(head, envelope, kept)
        trainer = self._trainer
        trainer.set_id(int(client))
        trainer.update_dataset(train_data, test_data, examples)
        dense = self._dense(task.full)
        trainer.set_model_params(plain_state(task.full if dense is None else dense.dense))
        if loaded is not None:
            loaded()
        visit = Visit(
            client=client,
            server_round=head.round,
            task=head.task,
            records={n: r.tensors for n, r in task.received.items() if n != MODEL},
            storage=Part(storage, "rule/"),
            train_data=trainer.local_train_dataset,
            device=self._device,
            args=self._args,
            trainer=trainer,
            exchanged=self._names,
        )
        if head.purpose == "prepare":
            work = self._rule.prepare(trainer.model, visit)
            payloads = self._payloads(task, work.records, work, kept)
        else:
            start_round(trainer.model, previous_steps=kept.steps())
            after, work = self._after_training(visit)
            if dense is not None:
                after = dense.after(after)
                check_finite(after)
            payloads = self._payloads(task, {MODEL: after, **work.records}, work, kept)
            private = {k: v for k, v in after.items() if k in self._spec.private_keys}
            kept.keep_private(self._spec, private)
            if (training := training_of(trainer.model)) is not None:
                kept.keep_steps(training.steps)
        answer = Head(
            round=head.round,
            purpose=head.purpose,
            examples=examples,
            holds={name: part.reference for name, part in task.received.items()},
            decoders=list(decoders()),
            fresh=task.fresh,
            report=work.report,
        )
        reply = pack(answer.to_json(), payloads)
        # Only now: a round that fails leaves no trace, and one that is killed none or all of it.
        storage.commit()
        return reply

    def _after_training(self, visit: Visit) -> tuple[State, LocalWork]:
        """The client's state after its training, and what the rule adds."""
        trainer, args = self._trainer, self._args
        count_once(trainer.model, visit.train_data)
        trainer.on_before_local_training(visit.train_data, self._device, args)
        with self._rule.around(trainer.model, visit) as work:
            trainer.train(visit.train_data, self._device, args)
        trained = to_state(trainer.get_model_params())
        trainer.on_after_local_training(visit.train_data, self._device, args)
        after = to_state(trainer.get_model_params())
        if local_dp_is_on():
            # What never leaves needs no noise.
            after |= {name: trained[name] for name in self._spec.private_keys}
        check_finite(after)
        return after, work

    def _lost(self, head: Head, envelope: Envelope, storage: Storage) -> bytes:
        references = ClientState(storage).references
        has = {name: list(references.holds(name)) for name in envelope.payloads}
        return pack(Head(round=head.round, purpose=head.purpose, lost=True, has=has).to_json(), {})

    def _payloads(
        self, task: Task, records: Mapping[str, State], work: LocalWork, kept: ClientState
    ) -> dict[str, bytes]:
        """The payloads of an answer; what the codec lost of them is kept."""
        coded = encoded(
            task, records, work, kept,
            spec=self._spec, codec=self._settings.uplink, updates=self._rule.updates,
        )  # fmt: skip
        if self._settings.downlink.needs_reference:
            for name, part in task.received.items():
                kept.references.keep(name, part)
        return coded

    def _dense(self, full: State) -> DenseRound | None:
        """The round of an ordinary model, where clients train one."""
        return DenseRound(self._spec, full) if self._settings.trains_dense else None
