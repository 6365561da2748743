"""What SCAFFOLD and FedDyn have in common in a client: its own variate or dual, kept and told."""

from __future__ import annotations

import logging
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
from fedpara_plugins_fedml.rules.base import LocalRule, LocalWork, State, Visit

__all__ = ["LocalDrift"]

log = logging.getLogger("fedpara.fedml")

Local = LocalScaffold | LocalFedDyn


class LocalDrift(LocalRule):
    """The client's half: its steps are corrected, by whatever trainer and optimizer they are made.

    Attributes:
        name: of the algorithm.
    """

    name = ""

    @abstractmethod
    def local(self, model: nn.Module, own: State | None, visit: Visit) -> Local:
        """The core's context around the training."""

    @abstractmethod
    def work(self, result: LocalResult) -> dict[str, State]:
        """What travels beside the model."""

    @abstractmethod
    def lost(self, own: StoredCorrectionState, errors: Mapping[str, State], visit: Visit) -> None:
        """Keep what the server will have, where a codec has lost something on the way."""

    @contextmanager
    def around(self, model: nn.Module, visit: Visit) -> Iterator[LocalWork]:
        """Correct the steps in this context; then keep and tell what came of it."""
        own = StoredCorrectionState(visit.storage, self.name, visit.client)
        undone = own.correction.begin(int(visit.task["accepted"]))
        if undone is not None:
            log.warning("fedpara: %s of client %s: %s", self.name, visit.client, undone)
        since = own.correction.confirmed_round
        work = LocalWork()
        local = self.local(model, own.correction.confirmed, visit)
        with local:
            yield work
        result = local.result
        if result is None:
            return
        self._tell(result, visit.client)
        work.report.update(since=since, kept=result.kept, norm=min(result.norm, 1e300))
        if result.own is None:
            own.save()
            return
        own.correction.end(result.own, visit.server_round)
        own.save()
        work.records.update(self.work(result))

        def encoded(errors: Mapping[str, State]) -> None:
            self.lost(own, errors, visit)
            own.save()

        work.on_encoded = encoded

    def _tell(self, result: LocalResult, client: str) -> None:
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
