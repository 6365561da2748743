"""The bytes that one message may make its receiver allocate, shared by all of its records."""

from __future__ import annotations

from fedpara_plugins.errors import TooLargeError
from fedpara_plugins.stages.handed_over import working_limit

__all__ = ["MessageBudget"]

SLACK = 4 * 2**20
"""Bytes that the tensors of a message may have beyond a multiple of the model: small models have
headers, counters and an app's own values that are larger than themselves."""


class MessageBudget:
    """What the tensors of one message may take, all records together.

    The tensors may have ``parts`` times the model's bytes, and 4 MiB. All that `decode_payload`
    allocates, tensors included, stays within one and a half times its limit and 10 MiB. So a
    message takes at most three times the receiver's own model and 16 MiB with the default:

        budget = MessageBudget(model_bytes)
        for payload in payloads:
            tensors = decode_payload(payload, limit=budget.left, most_tensors=count).tensors
            budget.spend(sum(tensor.nbytes for tensor in tensors.values()))

    Args:
        model_bytes: of the receiver's own model, or of what the receiver has sent.
        parts: states of the model's size that a message may hold: the model, and an optimizer's
            variates beside it.
    """

    def __init__(self, model_bytes: int, *, parts: int = 2) -> None:
        self._limit = parts * model_bytes + SLACK
        self._spent = 0

    @property
    def working(self) -> int:
        """Bytes that decoding the next record may take, its tensors and a reference included."""
        return max(working_limit(self._limit) - self._spent, 0)

    @property
    def left(self) -> int:
        """Bytes that the tensors of the next record may have."""
        return max(self._limit - self._spent, 0)

    def spend(self, size: int) -> None:
        """Take the bytes of a decoded record off; nothing is given back.

        Raises:
            TooLargeError: more than were left.
        """
        self._spent += max(size, 0)
        if self._spent > self._limit:
            raise TooLargeError(
                f"fedpara: the message holds tensors of {self._spent} bytes and more, and this "
                f"side's own model allows {self._limit}"
            )
