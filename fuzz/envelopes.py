"""Messages of the FedML adapter, as any client may send them: taken apart, and their head read.

None of the modules of the adapter that are used here imports FedML.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from fedpara_plugins import FedParaError, PayloadError
from fedpara_plugins.testing import check_refusal
from fedpara_plugins_fedml.messages.envelope import pack, unpack
from fedpara_plugins_fedml.messages.head import Head

__all__ = ["EnvelopeChecker", "is_envelope"]


def is_envelope(data: bytes) -> bool:
    """Tell whether a receiver would take these bytes for a message of ours."""
    return data[:4] == b"FPE1"


class EnvelopeChecker:
    """Checks messages.

    Args:
        payload: tries the bytes of one payload, and returns whether they are sound.
    """

    def __init__(self, payload: Callable[[bytes], bool]) -> None:
        self._payload = payload

    def check(self, data: bytes) -> bool:
        """Check bytes: if they are a message, try its content; return whether they are.

        Raises:
            AssertionError: it changes when it is packed again, or its answer cannot be packed.
        """
        try:
            found = unpack(data)
            head = Head.from_json(found.head)
        except PayloadError as error:
            check_refusal(error)
            return False
        assert len(b"".join(found.payloads.values())) < len(data), "payloads larger than all"
        assert unpack(pack(found.head, found.payloads)) == found, "packed again, it differs"
        assert Head.from_json(head.to_json()) == head, "the head changes when it is sent on"
        try:
            head.raise_error("3")
        except FedParaError as error:
            check_refusal(error)
        pack(head.failed(ValueError("x"), fatal=False).to_json(), {})
        results = [self._payload(payload) for payload in found.payloads.values()]
        return all(results)

    def seeds(self, payloads: list[bytes]) -> Iterator[bytes]:
        """Yield a message each way, one of a failed client, and one of a client without state."""
        model, other = payloads
        task = {"accepted": 3, "correct": True, "bound": 0.5}
        yield pack(Head(round=2, task=task).to_json(), {"model": model, "variate": other})
        answer = Head(
            round=2,
            examples=40.0,
            holds={"model": "ab" * 32},
            decoders=["zlib", "ans"],
            fresh=True,
            report={"since": 1, "kept": 1.0, "norm": 0.25},
        )
        yield pack(answer.to_json(), {"model": model, "change": other})
        lost = Head(round=2, purpose="prepare", lost=True, has={"model": ["ab" * 32]})
        yield pack(lost.to_json(), {})
        yield pack(answer.failed(ValueError("out of memory"), fatal=True).to_json(), {})
        yield pack(Head(round=3, purpose="evaluate", metrics={"loss": 2.5}).to_json(), {})
