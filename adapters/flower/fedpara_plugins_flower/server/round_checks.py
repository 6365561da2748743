"""Checks of a round's replies against each other: their form, and the sizes of their updates."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flwr.serverapp.strategy import Result

from fedpara_plugins import FedParaError
from fedpara_plugins.exchange import Outliers
from fedpara_plugins_flower.run import Run, Start, StartHook
from fedpara_plugins_flower.seams import replaced_methods
from fedpara_plugins_flower.server.reply_decoder import ReadReply
from fedpara_plugins_flower.server.reply_forms import ReplyForms, StrategyKeys

__all__ = ["RoundChecks", "guarded_aggregation"]

log = logging.getLogger("flwr.fedpara")


class RoundChecks:
    """Leaves out replies of another form than most others, and names updates far outside of them.

    Args:
        run: the run's settings and strategy.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._forms = ReplyForms()
        self._outliers = Outliers()

    def begin(self) -> None:
        """Begin a round: updates are compared with those of the same round."""
        self._outliers = Outliers()

    def usable(self, replies: Sequence[ReadReply]) -> list[ReadReply]:
        """Return the replies that go on to the strategy; the log names each of the others.

        Args:
            replies: that came together and passed the gate.
        """
        left_out = self._without_form(replies)
        if self._run.settings.outliers != "ignore":
            left_out |= self._far_outside([r for r in replies if r.node not in left_out])
        return [reply for reply in replies if reply.node not in left_out]

    def _without_form(self, replies: Sequence[ReadReply]) -> set[int]:
        read = [reply for reply in replies if reply.marker is not None]
        keys = StrategyKeys.of(self._run.strategy)
        unlike = self._forms.unlike([reply.message for reply in read], keys)
        for place, reason in unlike.items():
            log.warning("fedpara: left out the reply of node %d: %s", read[place].node, reason)
        return {read[place].node for place in unlike}

    def _far_outside(self, replies: Sequence[ReadReply]) -> set[int]:
        for reply in replies:
            if reply.norm is not None:
                self._outliers.add(str(reply.node), reply.norm, reply.size)
        leave_out = self._run.settings.outliers == "leave_out"
        found = self._outliers.reasons()
        for node, reason in found.items():
            what = "left out the reply of node" if leave_out else "node"
            log.warning("fedpara: %s %s: %s", what, node, reason)
        return {int(node) for node in found} if leave_out else set()


def guarded_aggregation(run: Run) -> StartHook:
    """Return a hook that lets a round fail, and not the run, where too few replies are usable.

    A strategy may raise any error of its own if replies are missing that had to be left out.

    Args:
        run: whose ``left_out`` counts them.
    """

    @contextlib.contextmanager
    def hook(start: Start) -> Iterator[Callable[[Result], Result]]:
        strategy = start["self"]
        methods = {
            "aggregate_train": _guarded(run, strategy.aggregate_train, (None, None)),
            "aggregate_evaluate": _guarded(run, strategy.aggregate_evaluate, None),
        }
        with replaced_methods(strategy, methods):
            yield lambda result: result

    return hook


def _guarded(run: Run, method: Callable[..., Any], nothing: Any) -> Callable[..., Any]:
    def aggregate(number: int, replies: Any, *args: Any, **kwargs: Any) -> Any:
        replies = list(replies)
        missing, run.left_out = run.left_out, 0
        try:
            return method(number, replies, *args, **kwargs)
        except FedParaError:
            raise
        except Exception as error:
            if not missing:
                raise
            log.error(
                "fedpara: round %d fails: %d replies were left out, and the strategy cannot work "
                "with the other %d (%s: %s); the model stays as it was",
                number, missing, len(replies), type(error).__name__, error,
            )  # fmt: skip
            return nothing

    return aggregate
