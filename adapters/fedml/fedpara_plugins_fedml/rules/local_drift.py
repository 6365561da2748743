"""The common part of SCAFFOLD and FedDyn in a client: its variate or dual between rounds."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from fedpara_plugins.optimizers import (
    LocalFedDyn,
    LocalResult,
    LocalScaffold,
    StoredCorrectionState,
)
from fedpara_plugins_fedml.logs import log
from fedpara_plugins_fedml.rules.base import LocalRule, ReplyExtras, RoundContext, State

__all__ = ["LocalDrift"]

Local = LocalScaffold | LocalFedDyn


class LocalDrift(LocalRule):
    """The client's part: it corrects each step, whatever trainer and optimizer make it.

    Attributes:
        name: of the algorithm.
    """

    name = ""

    @abstractmethod
    def local(self, model: nn.Module, own: State | None, local_round: RoundContext) -> Local:
        """Return the core's context around the training."""

    @abstractmethod
    def records(self, result: LocalResult) -> dict[str, State]:
        """Return the tensors that are sent besides the model."""

    @abstractmethod
    def correct_kept(
        self, own: StoredCorrectionState, errors: Mapping[str, State], local_round: RoundContext
    ) -> None:
        """Correct the kept state by the codec's errors, so that it is what the server decodes."""

    @contextmanager
    def around(self, model: nn.Module, local_round: RoundContext) -> Iterator[ReplyExtras]:
        """Correct the steps in this context; then keep the new state, and report on the round."""
        own = StoredCorrectionState(local_round.storage, self.name, local_round.client)
        undone = own.correction.begin(int(local_round.task["accepted"]))
        if undone is not None:
            log.warning("fedpara: %s of client %s: %s", self.name, local_round.client, undone)
        since = own.correction.confirmed_round
        extras = ReplyExtras()
        local = self.local(model, own.correction.confirmed, local_round)
        with local:
            yield extras
        result = local.result
        if result is None:
            return
        self._log_result(result, local_round.client)
        extras.report.update(since=since, kept=result.kept, norm=min(result.norm, 1e300))
        if result.own is None:
            own.save()
            return
        own.correction.end(result.own, local_round.server_round)
        own.save()
        extras.records.update(self.records(result))

        def encoded(errors: Mapping[str, State]) -> None:
            self.correct_kept(own, errors, local_round)
            own.save()

        extras.on_encoded = encoded

    def _log_result(self, result: LocalResult, client: str) -> None:
        if result.own is None:
            log.warning(
                "fedpara: %s: training gave NaN or infinity; this round of client %s counts for "
                "nothing", self.name, client,
            )  # fmt: skip
        elif result.kept < 1.0:
            log.info(
                "fedpara: %s: the guard kept %.0f %% of the update of client %s",
                self.name, 100 * result.kept, client,
            )  # fmt: skip
