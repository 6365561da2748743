"""The form of replies, which Flower's strategies require to be the same in a whole round.

`FedAvg`, of which all strategies are subclasses, raises an error if the replies of a round differ
in their records, the arrays' names or the metrics' names; and its aggregation does if a metric is a
number in one reply and a list in another. One client would end the run. The form that most replies
have counts, and the others are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedpara_plugins import PayloadError
from fedpara_plugins.exchange import check_figures, examples_of
from fedpara_plugins_flower.messages.drift_records import OPTIMIZER
from fedpara_plugins_flower.messages.records import is_optimizer_record
from fedpara_plugins_flower.seams import EXAMPLES, LEGACY_EXAMPLES

__all__ = ["ReplyForms", "StrategyKeys", "check_values", "value_bytes"]

Form = tuple[frozenset[Any], frozenset[Any]]

MOST_RECORDS = 64
"""Records of all kinds that a reply may hold."""

MOST_VALUES = 2**16
"""Single values that the records of metrics and configs may hold together."""

LARGEST_LOSS = 1e9
"""Largest loss by which a strategy may weigh a reply."""


@dataclass(frozen=True)
class StrategyKeys:
    """The metrics that a strategy reads of a reply.

    Attributes:
        known: whether a strategy of Flower runs.
        weight: the metric by which it weighs replies.
        loss: the metric by which QFedAvg does.
    """

    known: bool = False
    weight: str = EXAMPLES
    loss: str = ""

    @classmethod
    def of(cls, strategy: object) -> StrategyKeys:
        """Return those of a strategy, possibly inside a wrapper (of differential privacy)."""
        inner = getattr(strategy, "strategy", strategy)
        if not isinstance(inner, FedAvg):
            return cls()
        return cls(True, str(inner.weighted_by_key), str(getattr(inner, "train_loss_key", "")))


def check_values(content: RecordDict, keys: StrategyKeys) -> None:
    """Raise unless the metrics and configs of a reply are bounded, finite, and can be weighed by.

    Args:
        content: of the reply.
        keys: of the strategy.

    Raises:
        PayloadError: names record and value.
    """
    if len(content) > MOST_RECORDS:
        raise PayloadError(f"the reply holds {len(content)} records, at most {MOST_RECORDS}")
    plain: dict[str, Any] = {**content.metric_records, **content.config_records}
    plain.pop(OPTIMIZER, None)  # its reader checks it
    count = sum(len(v) if isinstance(v, list) else 1 for r in plain.values() for v in r.values())
    if count > MOST_VALUES:
        raise PayloadError(f"the reply holds {count} values, at most {MOST_VALUES} are taken")
    for name, record in plain.items():
        check_figures(name, record)
    for record in content.metric_records.values():
        for key in {keys.weight, LEGACY_EXAMPLES} & record.keys():
            weighs = keys.known or key == LEGACY_EXAMPLES
            examples_of(record[key], name=key, weighs=weighs)
        if keys.loss and keys.loss in record:
            _check_loss(keys.loss, record[keys.loss])


def value_bytes(content: RecordDict) -> int:
    """Return the bytes of a reply's metrics and configs, names included."""
    total = 0
    for records in (content.metric_records, content.config_records):
        for record in records.values():
            for key, value in record.items():
                every = value if isinstance(value, list) else [value]
                total += len(key)
                total += sum(len(v) if isinstance(v, str | bytes) else 8 for v in every)
    return total


def _check_loss(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0 <= value <= LARGEST_LOSS:
        raise PayloadError(
            f"the reply states {repr(value)[:80]} as {name!r}, by which the strategy weighs "
            f"replies: expected a number from 0 to {LARGEST_LOSS:g}"
        )


class ReplyForms:
    """Compares the replies of a round, and remembers the form of the rounds before.

    Only where a strategy of Flower reads them: a loop of the app's own may take any.
    """

    def __init__(self) -> None:
        self._agreed: dict[str, Form] = {}

    def unlike(self, replies: Sequence[Message], keys: StrategyKeys) -> dict[int, str]:
        """Return by place, and with the reason, the replies whose form is not that of most others.

        Where half of them have each of two forms, that of the rounds before counts, or else the one
        that strategies expect: one record of arrays, one of metrics with the weight in it. If no
        form is that of half of the replies, all may differ.

        Args:
            replies: of one type, usable otherwise.
            keys: of the strategy.
        """
        if not keys.known or not replies:
            return {}
        kind = replies[0].metadata.message_type
        train = kind.startswith("train")
        forms = [_form(reply.content, arrays=train) for reply in replies]
        counts = Counter(forms)

        def rank(form: Form) -> tuple[int, bool, bool]:
            agreed = self._agreed.get(kind) == form
            return counts[form], agreed, _expected(form, keys, arrays=train)

        best = max(counts, key=rank)
        if 2 * counts[best] < len(replies):
            return {}
        if not _expected(best, keys, arrays=train) and kind in self._agreed:
            best = self._agreed[kind]
        elif _expected(best, keys, arrays=train):
            self._agreed[kind] = best
        return {place: _words(form, best) for place, form in enumerate(forms) if form != best}


def _form(content: RecordDict, *, arrays: bool) -> Form:
    named = content.array_records.items() if arrays else ()
    metrics = content.metric_records.items()
    return (
        frozenset((n, frozenset(r)) for n, r in named if not is_optimizer_record(n)),
        frozenset((n, frozenset((k, _size(v)) for k, v in r.items())) for n, r in metrics),
    )


def _size(value: object) -> int:
    """Return the length of a list, -1 for a number."""
    return len(value) if isinstance(value, list) else -1


def _expected(form: Form, keys: StrategyKeys, *, arrays: bool) -> bool:
    tensors, metrics = form
    if len(metrics) != 1 or (arrays and len(tensors) != 1):
        return False
    ((_, values),) = metrics
    return (keys.weight, -1) in values


def _words(form: Form, expected: Form) -> str:
    """Return what differs between two forms."""
    parts = [_listed(mine) ^ _listed(other) for mine, other in zip(form, expected, strict=True)]
    unlike = sorted(parts[0] | parts[1])
    return (
        f"its records differ from those of most other replies: {', '.join(unlike[:4])} "
        f"({len(unlike)} differ)"
    )


def _listed(records: frozenset[Any]) -> set[str]:
    found = {f"record {name[:40]!r}" for name, _ in records}
    for name, inner in records:
        for entry in inner:
            key, size = entry if isinstance(entry, tuple) else (entry, -1)
            more = "" if size < 0 else f" (a list of {size})"
            found.add(f"{key[:80]!r} in {name[:40]!r}{more}")
    return found
