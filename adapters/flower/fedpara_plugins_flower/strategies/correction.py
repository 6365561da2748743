"""The client's part of SCAFFOLD and FedDyn: a context around the user's training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType

from flwr.app import ArrayRecord, Context, Message, RecordDict
from torch import Tensor, nn

from fedpara_plugins import ConfigError
from fedpara_plugins.exchange import refuse_in_factor_space
from fedpara_plugins.optimizers import LocalFedDyn, LocalResult, LocalScaffold
from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.messages.drift_records import (
    CHANGE,
    OPTIMIZER,
    VARIATE,
    ClientReport,
    ClientTask,
    to_bitmap,
)
from fedpara_plugins_flower.messages.records import to_record, to_tensors
from fedpara_plugins_flower.run import active_run
from fedpara_plugins_flower.strategies.client_state import open_correction_state

__all__ = ["Correction", "correction"]

Losses = Callable[[], Iterable[tuple[Tensor, int]]]


class Correction:
    """The context that `correction` returns.

    Attributes:
        algorithm: ``scaffold``, ``feddyn``, or "" where the server runs neither.
    """

    def __init__(
        self, model: nn.Module, message: Message, context: Context, losses: Losses | None
    ) -> None:
        self._task = ClientTask.of(message)
        self._local: LocalScaffold | LocalFedDyn | None = None
        self._since = 0
        if self._task is None:
            self.algorithm = ""
            return
        self.algorithm = self._task.algorithm
        self._context = context
        self._run = active_run()
        if self._run is not None:
            refuse_in_factor_space(self.algorithm, self._run.settings.config)
        with open_correction_state(context, self.algorithm, self._run) as state:
            self._client, self._kept = state.client, state.correction
        undone = self._kept.begin(self._task.accepted)
        if undone is not None:
            log.warning("fedpara: %s of %s: %s", self.algorithm, self._client, undone)
        self._since = self._kept.confirmed_round
        self._local = self._algorithm(model, message, self._task, losses)

    def _algorithm(
        self, model: nn.Module, message: Message, task: ClientTask, losses: Losses | None
    ) -> LocalScaffold | LocalFedDyn:
        own = self._kept.confirmed
        if task.algorithm == "feddyn":
            return LocalFedDyn(
                model, own=own, alpha=task.alpha, correct=task.correct, bound=task.bound
            )
        if task.algorithm != "scaffold":
            raise ConfigError(
                f"fedpara: the server asks for the algorithm {task.algorithm!r}, known here are "
                f"scaffold and feddyn; install the same fedpara-plugins-flower on both sides"
            )
        record = message.content.get(VARIATE)
        return LocalScaffold(
            model,
            own=own,
            server=to_tensors(record) if isinstance(record, ArrayRecord) else None,
            option="I" if task.option == "I" else "II",
            losses=losses,
            correct=task.correct,
            bound=task.bound,
        )

    def __enter__(self) -> Correction:
        if self._local is not None:
            self._local.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._local is None or self._task is None:
            return
        self._local.__exit__(kind, error, traceback)
        result = self._local.result
        if result is None:
            return
        if result.own is not None:
            self._kept.end(result.own, self._task.server_round)
        self._save()
        self._log_result(result)

    def _save(self) -> None:
        with open_correction_state(self._context, self.algorithm, self._run) as state:
            state.client, state.correction = self._client, self._kept
            state.save()

    def _log_result(self, result: LocalResult) -> None:
        if result.own is None:
            log.warning(
                "fedpara: %s: training gave NaN or infinity; this round of %s counts for nothing",
                self.algorithm, self._client,
            )  # fmt: skip
        elif result.kept < 1.0:
            log.info(
                "fedpara: %s: the guard kept %.0f %% of the update of %s",
                self.algorithm, 100 * result.kept, self._client,
            )  # fmt: skip

    def add_to(self, content: RecordDict) -> RecordDict:
        """Add the records that the server needs to a reply's content, and return it.

        Args:
            content: contains the model's state, ``ArrayRecord(model.state_dict())``.

        Raises:
            ConfigError: if it is called before the end of the training, or trained parameters are
                missing from the arrays.
        """
        if self._local is None:
            return content
        result = self._local.result
        if result is None:
            raise ConfigError(
                "fedpara: add_to() was called before the training was over: leave the context "
                "(with fedpara.correction(...) as correction: train(...)) first"
            )
        names = self._names(content)
        report = ClientReport(
            client=self._client,
            since=self._since,
            norm=result.norm,
            kept=result.kept,
            steps=result.steps,
            names=to_bitmap(names, self._local.names),
        )
        content[OPTIMIZER] = report.to_record()
        if self.algorithm == "scaffold" and result.own is not None:
            content[CHANGE] = to_record(result.change)
        if self._run is not None and result.own is not None:
            self._run.on_encoded = self._encoded
        return content

    def _encoded(self, lost: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Correct the kept state by the codec's error, so that it is what the server decodes."""
        if self._task is None or self._kept.pending is None:
            return
        if self.algorithm == "scaffold":
            self._kept.correct(lost.get(CHANGE, {}), -1.0)
        else:
            self._kept.correct(_joined(lost), self._task.alpha)
        self._save()

    def _names(self, content: RecordDict) -> list[str]:
        names = [name for record in content.array_records.values() for name in record]
        if missing := [name for name in self._local.names if name not in names]:  # type: ignore[union-attr]
            raise ConfigError(
                f"fedpara: {self.algorithm}: the reply holds no array named {missing[0]!r} "
                f"({len(missing)} trained parameters are missing); put the model's state into it "
                f"before add_to(): RecordDict({{'arrays': ArrayRecord(model.state_dict()), ...}})"
            )
        return names


def _joined(lost: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: value for part in lost.values() for name, value in part.items()}


def correction(
    model: nn.Module, message: Message, context: Context, *, losses: Losses | None = None
) -> Correction:
    """Run SCAFFOLD or FedDyn on a client, as the server's strategy says; do nothing with others.

        with fedpara.correction(model, msg, context) as correction:
            train(model, ...)                        # your own loop
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(correction.add_to(content), reply_to=msg)

    Inside the context, every step of a torch optimizer on the model's shared parameters is
    corrected. Variates and duals are kept in ``context.state``.

    Args:
        model: has loaded the message's arrays.
        message: that the client's train function received.
        context: of the client.
        losses: for SCAFFOLD's option I, makes one pass over this client's data and yields each
            batch's mean loss and number of examples.

    Returns:
        The context; its `Correction.add_to` completes the reply.

    Raises:
        ConfigError: if SCAFFOLD meets another optimizer than plain SGD, or option I lacks
            ``losses``.
        MismatchError: if the client's variates belong to another model.
    """
    return Correction(model, message, context, losses)
