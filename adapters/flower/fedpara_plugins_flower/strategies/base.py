"""The common base of the strategies Scaffold and FedDyn, a subclass of Flower's FedAvg."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedpara_plugins import ConfigError, FedParaError, PayloadError
from fedpara_plugins.exchange import reason_of, refuse_in_factor_space
from fedpara_plugins.optimizers import (
    Contributions,
    Guard,
    GuardedRounds,
    State,
    Weighting,
    log_outcome,
    norm,
    subtract,
)
from fedpara_plugins.support import printable, shortened
from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.messages.drift_records import (
    OPTIMIZER,
    VARIATE,
    ClientReport,
    ClientTask,
)
from fedpara_plugins_flower.messages.records import to_record, to_tensors
from fedpara_plugins_flower.run import active_run
from fedpara_plugins_flower.seams import checked_replies
from fedpara_plugins_flower.strategies.client_replies import (
    LINES,
    ClientReply,
    ReportAndChange,
    read_reply,
)

__all__ = ["DriftStrategy"]


class DriftStrategy(FedAvg):
    """FedAvg whose clients keep a variate or dual, and correct their steps by it.

    Args:
        weighting: how much each client counts: ``uniform``, as published, or ``examples``.
        guard: see `fedpara_plugins.optimizers.Guard`; None for the published algorithm.
        clients: number of all clients; None for the larger number of those that are connected and
            those that have ever answered.
        remember: whether the server keeps every client's variate or dual too, so that a lost one is
            subtracted from the sum exactly; costs a model's size for each client.
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
        self._answered = False

    # For the algorithms

    @abstractmethod
    def task(self, **common: Any) -> ClientTask:
        """Return the instructions for one client."""

    @abstractmethod
    def variate(self) -> State:
        """Return the tensors that are sent besides the model; {} for none."""

    @abstractmethod
    def next_x(self, replies: Sequence[ClientReply], server_round: int) -> State:
        """Return the next model, and add the replies' changes to `sums`."""

    @property
    def clients(self) -> int:
        """Return the number of all clients in this round."""
        return self._clients_given or max(len(self._connected), len(self.sums.rounds))

    # Flower's interface

    def summary(self) -> None:
        """Log the strategy's options."""
        guard = "off: as published" if self.guard is None else f"tau {self.guard.tau:g}"
        log.info("\t├──> %s: weighting %s, guard %s", self.algorithm, self.weighting, guard)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return FedAvg's messages, each with this algorithm's instructions for its client."""
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
            content[OPTIMIZER] = task.to_record()
            if record is not None:
                content[VARIATE] = record
            message.content = content
        return messages

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a restarted server needs: plain values and tensors."""
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
        """Restore the state of a strategy with the same options."""
        for name in ("total", "rounds", "weights", "clients", "kept"):
            getattr(self.sums, name).clear()
            getattr(self.sums, name).update(state[name])
        self._guarded.load_state_dict(state)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next model and the clients' mean metrics.

        Replies that cannot be used are left out, with a line in the log that names the node.
        """
        replies = list(replies)
        failed = [reply for reply in replies if reply.has_error()]
        found = [part for r in replies if not r.has_error() and (part := self._report_of(r))]
        self._check_first(found, failed)
        read = [u for reply, part in found if (u := self._read(reply, part)) is not None]
        usable = self._with_common_names(read)
        valid = checked_replies(self, [*failed, *(reply.message for reply in usable)])
        if not valid:
            return None, None
        x = self.next_x(usable, server_round)
        self._inform_guard(usable)
        contents = [message.content for message in valid]
        return to_record(x), self.train_metrics_aggr_fn(contents, self.weighted_by_key)

    # Parts

    def _check_first(self, found: Sequence[tuple[Message, Any]], failed: Sequence[Message]) -> None:
        """End the run in its first round if no client has this algorithm's lines."""
        if self._answered or not (found or failed):
            return
        if not found:
            raise FedParaError(
                f"fedpara: {type(self).__name__}: all {len(failed)} clients failed at the first "
                f"training message. Node {failed[0].metadata.src_node_id} said: "
                f"{printable(shortened(failed[0].error.reason or '', 2000))}"
            )
        self._answered = any(part is not None for _, part in found)
        if not self._answered:
            raise ConfigError(
                f"fedpara: the strategy is {type(self).__name__}, and the replies (of node "
                f"{found[0][0].metadata.src_node_id}, for example) lack the records of "
                f"fedpara.correction. Add to the client's train function: {LINES}"
            )

    needs_change = False

    def _report_of(self, message: Message) -> tuple[Message, ReportAndChange | None] | None:
        """Return a reply with its report; None if that cannot be read, and is left out."""
        try:
            return message, ClientReport.pop_from(message.content)
        except PayloadError as error:
            self._leave_out(message, error)
            return None

    def _with_common_names(self, replies: Sequence[ClientReply]) -> list[ClientReply]:
        """Return the replies whose trained parameters are those that most of them have."""
        counts = Counter(reply.reply.names for reply in replies)
        common = max(counts, key=lambda names: (counts[names], len(names)), default=None)
        for reply in replies:
            if reply.reply.names != common:
                self._leave_out(
                    reply.message,
                    PayloadError("its trained parameters are not those of the others"),
                )
        return [reply for reply in replies if reply.reply.names == common]

    def _leave_out(self, message: Message, error: Exception) -> None:
        node = message.metadata.src_node_id
        log.warning("fedpara: left out the reply of node %d: %s", node, reason_of(error))

    def _read(self, message: Message, found: ReportAndChange | None) -> ClientReply | None:
        try:
            return read_reply(
                message,
                found,
                model=self._x,
                examples_key=self.weighted_by_key,
                weighs=self.weighting == "examples",
                needs_change=self.needs_change,
            )
        except Exception as error:  # whatever it is, it is this reply's alone
            self._leave_out(message, error)
            return None

    def received_by(self, node: int) -> Mapping[str, Tensor]:
        """Return the model as a node received it: not exactly what was sent, with a lossy codec."""
        of_grid = getattr(self._grid, "received_by", None)
        received = None if of_grid is None else of_grid(node, self.arrayrecord_key)
        return self._x if received is None else received

    def add_change(self, reply: ClientReply, change: State, server_round: int) -> None:
        """Add a client's change to the sums, and log anything out of the ordinary."""
        report = reply.report
        verdict = self.sums.take(
            change,
            node=reply.node,
            client=report.client,
            since=report.since,
            server_round=server_round,
            weight=reply.reply.examples if self.weighting == "examples" else 1.0,
            connected=self._connected,
        )
        who = f"node {reply.node} ({report.client})"
        exactly = self.sums.remember
        log_outcome(log, self.algorithm, verdict, who, report.since, exactly=exactly)

    def _inform_guard(self, replies: Sequence[ClientReply]) -> None:
        """Give the guard the norms of the round's updates and the fractions that clients kept."""
        norms = {
            f"node {reply.node}": norm(
                subtract(reply.reply.arrays, {k: self._x[k] for k in reply.reply.names}).values()
            )
            for reply in replies
        }
        kept = {f"node {reply.node}": reply.report.kept for reply in replies}
        self._guarded.note(norms, kept)
