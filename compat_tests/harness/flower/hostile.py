"""Hostile replies: what a client may send in the place of its own, as it leaves the device.

Each function changes an honest reply after the plugin's mod has encoded it. The Grid of the tests
takes it apart into Flower's bytes and rebuilds it, so the server gets what a network would deliver.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from torch import Tensor

from fedpara_plugins.codecs import encode_payload, parse_codec
from harness.oracles.descriptions import decode_payload, separated

__all__ = ["HOSTILE", "LEGACY", "VARIATES", "Attack", "tampering"]

Attack = Callable[[Message], None]
State = dict[str, Tensor]

KEY = "fedpara.payload"
MARKER = "fedpara"
JOINT = "fedpara_joint"
NUMPY = "numpy.ndarray"
INF, NAN = float("inf"), float("nan")


def tampering(attacks: Attack | Sequence[Attack], client: int, kind: str = "train") -> Any:
    """Return a mod, to stand first, that changes one client's replies of a kind.

    Args:
        attacks: one for all rounds, or one for each round.
        client: its number.
        kind: type of the messages.
    """

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        number = _round_of(message)
        reply: Message = call_next(message, context)
        mine = int(context.node_config["partition-id"]) == client
        if mine and message.metadata.message_type == kind:
            _take_apart(reply)
            (attacks if callable(attacks) else attacks[number - 1])(reply)
        return reply

    return mod


def _take_apart(reply: Message) -> None:
    """Put the records of one payload in the place of it."""
    if reply.has_content() and JOINT in reply.content.array_records:
        data = bytes(reply.content.array_records[JOINT][KEY].numpy().tobytes())
        del reply.content[JOINT]
        for name, payload in separated({JOINT: data}).items():
            array = Array(np.frombuffer(payload, dtype=np.uint8))
            reply.content[name] = ArrayRecord({KEY: array})


def _round_of(message: Message) -> int:
    found = [
        r["server-round"] for r in message.content.config_records.values() if "server-round" in r
    ]
    return int(str(found[0])) if found else 0


# Changes of arrays


def _record(reply: Message) -> str:
    return next(name for name in reply.content.array_records if not name.startswith("fedpara."))


def _payload(reply: Message) -> bytes:
    data = reply.content.array_records[_record(reply)][KEY].numpy()
    return bytes(data.tobytes())


def with_array(make: Callable[[bytes], Array]) -> Attack:
    """Replace the array that carries the payload."""

    def attack(reply: Message) -> None:
        made = make(_payload(reply))
        reply.content[_record(reply)] = ArrayRecord({KEY: made})

    return attack


def _array(data: bytes, stype: str = NUMPY) -> Array:
    return Array("uint8", (len(data),), stype, data)


def _npy(header: str, body: bytes = b"") -> Array:
    text = header.encode().ljust(118) + b"\n"
    return _array(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body)


def _zip(payload: bytes) -> Array:
    buffer = io.BytesIO()
    np.savez(buffer, np.frombuffer(payload, np.uint8))
    return _array(buffer.getvalue())


def _bomb(payload: bytes) -> Array:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("arr_0.npy", bytes(10**7))
    return _array(buffer.getvalue())


def _pickle(payload: bytes) -> Array:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return _array(buffer.getvalue())


U1 = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s,), }"


# Changes of tensors


def with_tensors(change: Callable[[State], State]) -> Attack:
    """Encode other tensors in the place of the client's, as the plugin would."""

    def attack(reply: Message) -> None:
        decoded = decode_payload(_payload(reply), limit=2**30)
        payload = encode_payload(
            change(dict(decoded.tensors)),
            codec=parse_codec("none"),
            model=decoded.header.model,
            extra=decoded.header.extra,
        )
        reply.content[_record(reply)] = _carrying(payload)

    return attack


def _carrying(payload: bytes) -> ArrayRecord:
    return ArrayRecord({KEY: Array(np.frombuffer(payload, np.uint8))})


def _first_float(state: State) -> str:
    return next(name for name, value in state.items() if value.is_floating_point())


def one(change: Callable[[Tensor], Tensor]) -> Attack:
    """Change the first floating-point tensor."""
    return with_tensors(lambda s: {**s, (n := _first_float(s)): change(s[n])})


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.full_like(tensor, value)


def _huge_factors(state: State) -> State:
    return {
        name: torch.full_like(value, 1e25) if name.endswith(("x1", "y1", "x2", "y2")) else value
        for name, value in state.items()
    }


def _renamed(state: State) -> State:
    name = _first_float(state)
    return {("renamed" if key == name else key): value for key, value in state.items()}


def _record_of(tensors: State) -> ArrayRecord:
    return _carrying(encode_payload(tensors, codec=parse_codec("none")))


# Changes of records


def adding(**records: Callable[[Message], Any]) -> Attack:
    """Add records, or replace them; ``__`` in a name stands for ``.``."""

    def attack(reply: Message) -> None:
        for name, make in records.items():
            reply.content[name.replace("__", ".")] = make(reply)

    return attack


def _without(reply: Message, *names: str) -> None:
    for name in names:
        del reply.content[name]


def _all_gone(reply: Message) -> None:
    _without(reply, *[name for name in reply.content if name != MARKER])


def _record_renamed(reply: Message) -> None:
    name = _record(reply)
    reply.content["other"] = reply.content[name]
    _without(reply, name)


def _many(reply: Message) -> None:
    small = _record_of({"a": torch.zeros(1)})
    for number in range(2000):
        reply.content[f"r{number}"] = small


def _marker(**values: Any) -> Attack:
    def attack(reply: Message) -> None:
        marker = ConfigRecord(dict(reply.content.config_records[MARKER]))
        for name, value in values.items():
            marker[name.replace("_", ".")] = value
        reply.content[MARKER] = marker

    return attack


def _thousands_held(reply: Message) -> None:
    _marker(**{f"holds_{n}": "ab" * 32 for n in range(5000)})(reply)


def _metrics(change: Callable[[dict[str, Any]], None]) -> Attack:
    def attack(reply: Message) -> None:
        name = next(iter(reply.content.metric_records))
        values = dict(reply.content.metric_records[name])
        change(values)
        reply.content[name] = MetricRecord(values)

    return attack


def examples(value: Any) -> Attack:
    """State another number of examples."""
    return _metrics(lambda m: m.update({k: value for k in m if "examples" in k}))


def _metrics_renamed(reply: Message) -> None:
    name = next(iter(reply.content.metric_records))
    reply.content["other"] = reply.content[name]
    _without(reply, name)


def typed(kind: str) -> Attack:
    """Answer as another type of message."""

    def attack(reply: Message) -> None:
        reply.metadata.__dict__["_message_type"] = kind

    return attack


BOTH: Mapping[str, tuple[Attack, str]] = {
    "no npy": (with_array(lambda p: _array(b"garbage")), "carries no payload"),
    "a zip": (with_array(_zip), "carries no payload"),
    "a zip bomb": (with_array(_bomb), "carries no payload"),
    "an object array": (with_array(_pickle), "carries no payload"),
    "an unknown stype": (with_array(lambda p: _array(p, "pickle")), "carries no payload"),
    "a shape of 8 TB": (with_array(lambda p: _npy(U1 % 2**43, p)), "carries no payload"),
    "a nested header": (with_array(lambda p: _npy("(" * 90)), "carries no payload"),
    "float32 in the payload's place": (
        with_array(lambda p: Array(np.zeros(9, np.float32))),
        "carries no payload",
    ),
    "two dimensions": (with_array(lambda p: Array(np.zeros((3, 3), np.uint8))), "no payload"),
    "no bytes": (with_array(lambda p: Array("uint8", (0,), NUMPY, b"")), "holds no values"),
    "an empty payload": (with_array(lambda p: Array(np.zeros(0, np.uint8))), "incomplete|payload"),
    "half a payload": (with_array(lambda p: Array(np.frombuffer(p[:99], np.uint8))), ""),
    "a flipped bit": (
        with_array(lambda p: Array(np.frombuffer(p[:-1] + bytes([p[-1] ^ 1]), np.uint8))),
        "checksum",
    ),
    "bfloat16 of NaN": (one(lambda t: torch.full_like(t, NAN).bfloat16()), "NaN"),
    "float8": (one(lambda t: t.to(torch.float8_e5m2)), "float8"),
    "complex": (one(lambda t: t.to(torch.complex64)), "complex64"),
    "complex NaN": (one(lambda t: torch.full_like(t, NAN).to(torch.complex64)), "complex64"),
    "booleans": (one(lambda t: t > 0), "bool"),
    "float64 that float32 cannot hold": (one(lambda t: torch.full_like(t.double(), 1e300)), "inf"),
    "NaN": (one(_filled(NAN)), "NaN"),
    "infinity": (one(_filled(-INF)), "NaN or infinite"),
    "factors that overflow": (with_tensors(_huge_factors), "compose"),
    "another shape": (one(lambda t: t.reshape(-1)[1:]), "shape"),
    "a transposed shape": (one(lambda t: t.reshape(1, *t.shape)), "shape"),
    "an extra tensor": (with_tensors(lambda s: {**s, "extra": torch.zeros(2)}), "other names"),
    "a renamed tensor": (with_tensors(_renamed), "other names"),
    "no tensors": (with_tensors(lambda s: {}), "other names|payload"),
    "thousands of tensors": (
        with_tensors(lambda s: {**s, **{f"t{n}": torch.zeros(1) for n in range(5000)}}),
        "",
    ),
    "100 MB of zeros": (one(lambda t: torch.zeros(25 * 10**6)), "limit"),
    "an integer as a flag": (_marker(fresh=1), "'fresh', expected a boolean"),
    "an integer as another flag": (_marker(lost=0), "'lost', expected a boolean"),
    "a path as a hash": (_marker(holds_parameters="../../etc/passwd"), "as a hash"),
    "a number as a hash": (_marker(holds_arrays=7), "expected text"),
    "thousands of hashes": (_thousands_held, "5001|500"),
    "text as decoders": (_marker(decoders="zlib"), "expected a list"),
    "very long decoders": (_marker(decoders=["z" * 10**5]), "decoders"),
    "a secure aggregation of its own": (
        adding(secaggplus_configs=lambda r: ConfigRecord({"masked_params": [1, 2]})),
        "",
    ),
    "an unasked variate": (
        adding(fedpara__variate=lambda r: r.content[_record(r)]),
        "unasked",
    ),
    "an unasked change": (
        adding(fedpara__update__variate=lambda r: r.content[_record(r)]),
        "unasked",
    ),
    "an unasked report": (
        adding(fedpara__optimizer=lambda r: ConfigRecord({"client": "x"})),
        "unasked",
    ),
    "2,000 records": (_many, "records|unasked"),
    "NaN examples": (examples(NAN), "examples"),
    "negative examples": (examples(-5), "examples"),
    "no examples": (examples(0), "examples"),
    "infinite examples": (examples(INF), "examples"),
    "more examples than there are": (examples(1e300), "examples"),
    "a list of examples": (examples([3, 4]), "examples"),
    "a forged type": (typed("evaluate"), "it answers as 'evaluate'"),
    "another forged type": (typed("get_parameters"), "it answers as 'get_parameters'"),
    "a type that no strategy has": (typed("train.other"), "it answers as"),
}
"""Attacks on any reply to a training message, and what the line in the log says."""

HOSTILE: Mapping[str, tuple[Attack, str]] = {
    **BOTH,
    "a missing tensor": (with_tensors(lambda s: dict(list(s.items())[1:])), "differ from those"),
    "no records at all": (_all_gone, "differ from those"),
    "no arrays": (lambda r: _without(r, _record(r)), "differ from those"),
    "an empty record": (adding(arrays=lambda r: ArrayRecord({})), "holds no values"),
    "a record of another name": (_record_renamed, "differ from those"),
    "a second record": (adding(more=lambda r: _record_of({"a": torch.ones(2)})), "differ from"),
    "a second record with NaN": (
        adding(more=lambda r: _record_of({"a": torch.full((2,), NAN)})),
        "NaN",
    ),
    "a second record of plain arrays": (
        adding(more=lambda r: ArrayRecord([np.zeros(3)])),
        "carries no payload",
    ),
    "no metrics": (lambda r: _without(r, "metrics"), "differ from those"),
    "metrics of another name": (_metrics_renamed, "differ from those"),
    "two records of metrics": (adding(more=lambda r: MetricRecord({"a": 1})), "differ from"),
    "a missing metric": (_metrics(lambda m: m.pop("train_loss")), "differ from those"),
    "a missing weight": (_metrics(lambda m: m.pop("num-examples")), "differ from those"),
    "a further metric": (_metrics(lambda m: m.update(extra=1.0)), "differ from those"),
    "a list as a metric": (_metrics(lambda m: m.update(train_loss=[1.0])), "differ from those"),
    "a metric that is NaN": (_metrics(lambda m: m.update(train_loss=NAN)), "as 'train_loss'"),
    "a million values": (_metrics(lambda m: m.update(train_loss=[0.0] * 10**6)), "values"),
    "50 MB of text": (adding(more=lambda r: ConfigRecord({"a": "x" * 5 * 10**7})), "own model"),
    "no marker": (lambda r: _without(r, MARKER), "answers without the plugin"),
}
"""Attacks on the Message API."""

LEGACY: Mapping[str, tuple[Attack, str]] = {
    **BOTH,
    "a missing tensor": (with_tensors(lambda s: dict(list(s.items())[1:])), "other names"),
    "no records at all": (_all_gone, "no arrays"),
    "no arrays": (lambda r: _without(r, _record(r)), "no arrays"),
    "a record of another name": (_record_renamed, "unasked"),
    "plain arrays": (
        adding(fitres__parameters=lambda r: ArrayRecord([np.zeros(3)])),
        "unasked",
    ),
    "metrics that are NaN": (
        adding(fitres__metrics=lambda r: ConfigRecord({"train_loss": NAN})),
        "as 'train_loss'",
    ),
    "no marker": (lambda r: _without(r, MARKER), "answers without the plugin"),
}
"""Attacks on the legacy API."""


def _report(**values: Any) -> Attack:
    def attack(reply: Message) -> None:
        record = ConfigRecord(dict(reply.content.config_records["fedpara.optimizer"]))
        for name, value in values.items():
            record[name] = value
        reply.content["fedpara.optimizer"] = record

    return attack


def _change(change: Callable[[State], State]) -> Attack:
    def attack(reply: Message) -> None:
        name = "fedpara.update.variate"
        data = reply.content.array_records[name][KEY].numpy().tobytes()
        tensors = decode_payload(data, limit=2**30).tensors
        reply.content[name] = _record_of(change(dict(tensors)))

    return attack


VARIATES: Mapping[str, tuple[Attack, str]] = {
    "a change with NaN": (_change(lambda s: {k: v * NAN for k, v in s.items()}), "NaN"),
    "a change of another shape": (
        _change(lambda s: {k: v.reshape(-1) for k, v in s.items()}),
        "shape",
    ),
    "a change of fewer names": (_change(lambda s: dict(list(s.items())[1:])), "variate's names"),
    "a change of other names": (_change(lambda s: {**s, "z": torch.ones(1)}), "no shared name"),
    "a complex change": (_change(lambda s: {k: v + 0j for k, v in s.items()}), "complex64"),
    "no change": (lambda r: _without(r, "fedpara.update.variate"), "variate's names"),
    "no report": (lambda r: _without(r, "fedpara.optimizer"), "lacks the records"),
    "a report that keeps NaN": (_report(kept=NAN), "'kept'"),
    "a report that keeps twice": (_report(kept=2.0), "'kept'"),
    "a report of text": (_report(norm="x"), "'norm'"),
    "a report since NaN": (_report(since=NAN), "'since'"),
    "a report since a flag": (_report(since=True), "'since'"),
    "a report of infinite steps": (_report(steps=INF), "'steps'"),
    "a report of other names": (_report(names=b""), "variate's names|trained parameters"),
    "a report of a million names": (_report(names=b"\xff" * 10**6), "10"),
    "a report of no client": (_report(client=3), "the client"),
}
"""Attacks on SCAFFOLD."""
