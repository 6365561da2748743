"""The clients' side of a run: decode, train with the user's trainer, encode.

What else is done with their models, tests and exports, is in `client_models`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fedpara_plugins import ConfigError, ConversionError, FedParaError, MismatchError
from fedpara_plugins.exchange import ClientRound, ClientState, LacksFrozenError
from fedpara_plugins.references import LostReferenceError
from fedpara_plugins.support import PrefixView, Storage
from fedpara_plugins.training import round_progress, start_round
from fedpara_plugins_fedml.engine.client_models import ClientModels
from fedpara_plugins_fedml.engine.labels import count_once
from fedpara_plugins_fedml.engine.models import to_state
from fedpara_plugins_fedml.messages.envelope import Envelope, pack, unpack
from fedpara_plugins_fedml.messages.head import MODEL, Head
from fedpara_plugins_fedml.rules import LocalRule, ReplyExtras, RoundContext, State
from fedpara_plugins_fedml.seams import local_dp_is_on
from fedpara_plugins_fedml.settings import FedMLSettings

__all__ = ["ClientEngine"]

log = logging.getLogger("fedpara.fedml")

FATAL = (ConfigError, ConversionError, MismatchError)
"""No other round will mend them."""


class _Data(NamedTuple):
    train: Any
    test: Any
    examples: float


class ClientEngine(ClientModels):
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
        settings: FedMLSettings,
        args: Any,
        device: torch.device,
        trainer: Any,
        local_rule: LocalRule,
        factors: nn.Module | None = None,
    ) -> None:
        super().__init__(
            settings, args, device, trainer, factors,
            updates=local_rule.updates, parts=local_rule.parts,
        )  # fmt: skip
        self._rule = local_rule

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
        head = Head(round=0)
        with contextlib.closing(self._storages.open(client)) as storage:
            client_round = self._round_of(ClientState(storage, client))
            try:
                envelope = unpack(data)
                head = Head.from_json(envelope.head)
                visit = self._loaded(
                    client, head, envelope, client_round, storage,
                    _Data(train_data, test_data, examples),
                )  # fmt: skip
                if loaded is not None:
                    loaded()
                return self._answer(head, visit, client_round, storage, examples)
            except LacksFrozenError as error:
                log.info("fedpara: the server is asked for its frozen tensors: %s", error)
                lost = Head(round=head.round, purpose=head.purpose, lost=True, lacks=[error.record])
                return pack(lost.to_json(), {})
            except LostReferenceError as error:
                log.warning("fedpara: the server is asked to send again: %s", error)
                has = client_round.known_hashes()
                lost = Head(round=head.round, purpose=head.purpose, lost=True, has=has)
                return pack(lost.to_json(), {})
            except Exception as error:
                fatal = isinstance(error, FATAL)
                log.log(
                    logging.ERROR if fatal else logging.WARNING,
                    "fedpara: client %s has no answer in round %d: %s", client, head.round, error,
                    exc_info=not isinstance(error, FedParaError),
                )  # fmt: skip
                return pack(head.failed(error, fatal=fatal).to_json(), {})

    def _loaded(
        self,
        client: str,
        head: Head,
        envelope: Envelope,
        client_round: ClientRound,
        storage: Storage,
        data: _Data,
    ) -> RoundContext:
        """Decode a message, and give the trainer the model and the client's data."""
        if head.purpose not in ("train", "prepare"):
            raise MismatchError(f"a message for {head.purpose!r} came where training was due")
        trainer = self._trainer
        self._args.round_idx = head.round - 1
        model = self._received(client_round, envelope.payloads)
        trainer.set_id(int(client))
        trainer.update_dataset(*data)
        self._give_trainer(model.user_tensors)
        beside = {
            name: part.user_tensors for name, part in client_round.received.items() if name != MODEL
        }
        return RoundContext(
            client=client,
            server_round=head.round,
            task=head.task,
            records=beside,
            storage=PrefixView(storage, "rule/"),
            train_data=trainer.local_train_dataset,
            device=self._device,
            args=self._args,
            trainer=trainer,
            exchanged=self._names,
        )

    def _answer(
        self,
        head: Head,
        visit: RoundContext,
        client_round: ClientRound,
        storage: Storage,
        examples: float,
    ) -> bytes:
        """Do what was asked, encode what came of it, and keep the rest."""
        steps = 0
        if head.purpose == "prepare":
            work = self._rule.prepare(self._trainer.model, visit)
            records: Mapping[str, State] = work.records
        else:
            start_round(self._trainer.model, previous_steps=client_round.previous_steps)
            after, work = self._after_training(visit)
            records = {MODEL: after, **work.records}
            training = round_progress(self._trainer.model)
            steps = 0 if training is None else training.steps
        leaving = client_round.prepare_reply(records, noisy=local_dp_is_on())
        payloads = client_round.encode(leaving, on_encoded=work.on_encoded)
        client_round.keep(steps=steps)
        answer = Head(
            round=head.round,
            purpose=head.purpose,
            examples=examples,
            holds=client_round.received_hashes,
            decoders=client_round.decoders,
            fresh=client_round.fresh,
            report=work.report,
        )
        reply = pack(answer.to_json(), payloads)
        # Only now: a round that fails leaves no trace, and one that is killed none or all of it.
        storage.commit()
        return reply

    def _after_training(self, visit: RoundContext) -> tuple[State, ReplyExtras]:
        """Return the client's state after its training, and what the rule adds."""
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
        return after, work
