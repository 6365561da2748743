"""What the strategies Scaffold and FedDyn have in common, on top of Flower's FedAvg."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.common import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError
from fedpara_plugins.exchange import refuse_in_factor_space
from fedpara_plugins.optimizers import (
    ClientReply,
    Contributions,
    Guard,
    GuardedRounds,
    State,
    Weighting,
    finite,
    log_outcome,
    norm,
    subtract,
)
from fedpara_plugins_flower.messages.drift_records import TASK, VARIATE, Report, Task, names_of
from fedpara_plugins_flower.messages.records import to_record, to_tensors
from fedpara_plugins_flower.run import active_run

__all__ = ["Answer", "DriftStrategy"]

log = logging.getLogger("flwr.fedpara")

LINES = (
    "with fedpara.correction(model, msg, context) as correction: train(...), and "
    "Message(correction.add_to(content), reply_to=msg)"
)


@dataclass(frozen=True)
class Answer:
    """One client's usable reply."""

    node: int
    report: Report
    reply: ClientReply
    change: State
    message: Message


class DriftStrategy(FedAvg):
    """FedAvg whose clients keep a variate or dual, and correct their steps by it.

    Args:
        weighting: ``uniform``, as published, or ``examples``: how much each client counts.
        guard: see `fedpara_plugins.optimizers.Guard`; None for the published algorithm.
        clients: how many there are in all; None for those that are connected, or have ever
            answered, if these are more.
        remember: keep every client's variate or dual on the server too, so that what a client
            lost is taken out of the sum exactly; costs a model's size for each client.
        options: of FedAvg.
    """

    algorithm = ""

    def __init__(
        self,
        *,
        weighting: Weighting,
        guard: Guard | None,
        clients: int | None,
        remember: bool,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if weighting not in ("uniform", "examples"):
            raise ConfigError(f"weighting must be 'uniform' or 'examples', got {weighting!r}")
        self.guard = guard
        self.weighting = weighting
        self.sums = Contributions(remember=remember)
        self._clients_given = clients
        self._guarded = GuardedRounds(guard, self.algorithm, log)
        self._x: State = {}
        self._grid: Grid | None = None
        self._connected: list[int] = []
        self._correct = True
        self._met = False

    # For the algorithms

    @abstractmethod
    def task(self, **common: Any) -> Task:
        """What is asked of a client."""

    @abstractmethod
    def variate(self) -> State:
        """What is sent beside the model; {} for nothing."""

    @abstractmethod
    def next_x(self, answers: Sequence[Answer], server_round: int) -> State:
        """The next model from the replies that count; takes their changes into `sums`."""

    @property
    def clients(self) -> int:
        """How many clients there are in all, in this round."""
        return self._clients_given or max(len(self._connected), len(self.sums.rounds))

    # Flower's interface

    def summary(self) -> None:
        """Log what the strategy does."""
        guard = "off: as published" if self.guard is None else f"tau {self.guard.tau:g}"
        log.info("\t├──> %s: weighting %s, guard %s", self.algorithm, self.weighting, guard)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """FedAvg's messages, and in each what this algorithm asks of that client."""
        if (run := active_run()) is not None:
            refuse_in_factor_space(self.algorithm, run.settings.config)
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._x = to_tensors(arrays)
        self._grid = grid
        self._connected = list(grid.get_node_ids())
        self._correct, bound = self._guarded.begin(clients=self.clients, a_round=len(messages))
        variate = self.variate()
        record = to_record(variate) if variate else None
        for message in messages:
            node = message.metadata.dst_node_id
            task = self.task(
                server_round=server_round,
                accepted=self.sums.accepted(node),
                correct=self._correct,
                bound=bound,
            )
            content = RecordDict(dict(message.content.items()))
            content[TASK] = task.to_record()
            if record is not None:
                content[VARIATE] = record
            message.content = content
        return messages

    def state_dict(self) -> dict[str, Any]:
        """What a server that is started again must know: plain values and tensors."""
        sums = self.sums
        return {
            "total": sums.total,
            "rounds": sums.rounds,
            "weights": sums.weights,
            "clients": sums.clients,
            "kept": sums.kept,
            **self._guarded.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Undo `state_dict`, on a strategy of the same options."""
        for name in ("total", "rounds", "weights", "clients", "kept"):
            getattr(self.sums, name).clear()
            getattr(self.sums, name).update(state[name])
        self._guarded.load_state_dict(state)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The next model; replies that cannot be used are logged with their node and left out."""
        replies = list(replies)
        failed = [reply for reply in replies if reply.has_error()]
        found = [(r, Report.taken_from(r.content)) for r in replies if not r.has_error()]
        self._check_first(found, failed)
        answers = [a for r, taken in found if (a := self._answer(r, taken)) is not None]
        valid, _ = self._check_and_log_replies([*failed, *(a.message for a in answers)], True)
        if not valid:
            return None, None
        x = self.next_x(answers, server_round)
        self._note(answers)
        contents = [message.content for message in valid]
        return to_record(x), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    # Parts

    def _check_first(self, found: Sequence[tuple[Message, Any]], failed: Sequence[Message]) -> None:
        """End the run while nothing is lost yet, if no client has this algorithm's lines."""
        if self._met or not (found or failed):
            return
        if not found:
            raise FedParaError(
                f"fedpara: {type(self).__name__}: all {len(failed)} clients failed at the first "
                f"training message. Node {failed[0].metadata.src_node_id} said: "
                f"{failed[0].error.reason}"
            )
        self._met = any(taken is not None for _, taken in found)
        if not self._met:
            raise ConfigError(
                f"fedpara: the strategy is {type(self).__name__}, and the clients (node "
                f"{found[0][0].metadata.src_node_id}, for one) answer without its half. Add to "
                f"the client's train function: {LINES}"
            )

    def _answer(
        self, message: Message, taken: tuple[Report, ArrayRecord | None] | None
    ) -> Answer | None:
        node = message.metadata.src_node_id
        why = None
        if taken is None:
            why = f"it answers without the client's half; its train function needs {LINES}"
        else:
            report, record = taken
            arrays = {
                name: value
                for part in message.content.array_records.values()
                for name, value in to_tensors(part).items()
            }
            change = {} if record is None else to_tensors(record)
            names = names_of(report.names, arrays)
            why = self._unusable(report, arrays, change, names)
        if why is not None or taken is None:
            log.warning("fedpara: left out the reply of node %d: %s", node, why)
            return None
        examples = next(iter(message.content.metric_records.values()), MetricRecord())
        count = examples.get(self.weighted_by_key, 1.0)
        weight = float(count) if isinstance(count, int | float) else 1.0
        return Answer(node, report, ClientReply(arrays, names, weight), change, message)

    def _unusable(
        self, report: Report, arrays: State, change: State, names: frozenset[str]
    ) -> str | None:
        if report.kept == 0.0:
            return "its training gave NaN or infinity"
        if not finite([*arrays.values(), *change.values()]):
            return "it holds NaN or infinity"
        for name in names:
            if name not in self._x or self._x[name].shape != arrays[name].shape:
                return f"its {name!r} is not what was sent"
        if arrays.keys() != self._x.keys():
            return f"its names differ from the model's: {sorted(arrays.keys() ^ self._x.keys())}"
        if self.needs_change and change.keys() != names:
            return "its variate's names are not those of its trained parameters"
        return None

    needs_change = False

    def received_by(self, node: int) -> Mapping[str, Tensor]:
        """The model as that node received it: not quite what was sent, if a codec is lossy."""
        ask = getattr(self._grid, "received_by", None)
        received = None if ask is None else ask(node, self.arrayrecord_key)
        return self._x if received is None else received

    def take(self, answer: Answer, change: State, server_round: int) -> None:
        """Take a client's change into the sums, and say what was out of the ordinary."""
        report = answer.report
        verdict = self.sums.take(
            change,
            node=answer.node,
            client=report.client,
            since=report.since,
            server_round=server_round,
            weight=answer.reply.examples if self.weighting == "examples" else 1.0,
            connected=self._connected,
        )
        who = f"node {answer.node} ({report.client})"
        exactly = self.sums.remember
        log_outcome(log, self.algorithm, verdict, who, report.since, exactly=exactly)

    def _note(self, answers: Sequence[Answer]) -> None:
        """Tell the guard what came of the round."""
        norms = {
            f"node {a.node}": norm(
                subtract(a.reply.arrays, {k: self._x[k] for k in a.reply.names}).values()
            )
            for a in answers
        }
        self._guarded.note(norms, {f"node {a.node}": a.report.kept for a in answers})
