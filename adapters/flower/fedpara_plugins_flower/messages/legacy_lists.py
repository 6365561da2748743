"""Names for the arrays of Flower's legacy API (``NumPyClient``, ``server_fn``), which sends lists.

Such an app sends ``state_dict().values()`` (or ``parameters()``) of its model as a list. Both sides
of the plugin name the arrays before they encode and remove the names after they have decoded, so
that all steps in between handle named tensors only. In messages the record has one name for
training and evaluation alike: a record received for one is the reference for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedpara_plugins import ConfigError, ModelSpec, PayloadError
from fedpara_plugins_flower.messages.records import to_record, with_content
from fedpara_plugins_flower.seams import (
    GET_PARAMETERS,
    LEGACY_REPLIES,
    LEGACY_REQUESTS,
    NUMPY,
    is_legacy,
)

__all__ = [
    "GET_PARAMETERS",
    "LEGACY_REPLIES",
    "PARAMETERS",
    "Namer",
    "answers_with_list",
    "asks_for_parameters",
    "carries_nothing",
    "is_legacy",
    "name_reply",
    "named_state",
    "request_name",
    "unname_reply",
    "without_names",
]

PARAMETERS = "parameters"
"""Name of a legacy record of arrays in messages. It is a model, so private state is held back."""

EXPECTED_LIST = (
    "the list must be that of model.state_dict().values(), or of model.parameters(), of the model "
    "that Net = fedpara.factorised(Net) builds, in that order and complete"
)


def asks_for_parameters(message: Message) -> bool:
    """Return whether a message asks a client for the first weights, or is the reply to that."""
    kind: str = message.metadata.message_type
    return kind == GET_PARAMETERS


def carries_nothing(record: ArrayRecord) -> bool:
    """Return whether a record holds no value: an empty list, as the legacy API writes it."""
    return all(not array.data for array in record.values())


class Namer:
    """Names for the arrays that a legacy strategy sends.

    The legacy API makes a new record for every client. The same bytes become the same record here,
    so that they are encoded once and not once for each client.

    Args:
        specs: the models that the server knows, by their set of names; looked up for each message.
        plain_names: whether positions serve as names, because no model is converted.
    """

    def __init__(self, specs: Mapping[frozenset[str], ModelSpec], *, plain_names: bool) -> None:
        self._specs = specs
        self._plain_names = plain_names
        self._last: tuple[list[bytes], ArrayRecord] | None = None

    def named(self, message: Message) -> Message:
        """Return the message with named arrays; itself if it is not a legacy message.

        Raises:
            ConfigError: if no known model has such a list of arrays.
        """
        name = LEGACY_REQUESTS.get(message.metadata.message_type)
        record = message.content.array_records.get(name) if name else None
        if record is None:
            return message
        content = RecordDict(
            {PARAMETERS if key == name else key: value for key, value in message.content.items()}
        )
        content[PARAMETERS] = self._named(record)
        return with_content(message, content)

    def _named(self, record: ArrayRecord) -> ArrayRecord:
        data = [array.data for array in record.values()]
        if self._last is None or not _same(self._last[0], data):
            self._last = data, self._renamed(record)
        return self._last[1]

    def _renamed(self, record: ArrayRecord) -> ArrayRecord:
        if carries_nothing(record):
            raise ConfigError(
                "fedpara: the server has no weights to send. Give the strategy "
                "initial_parameters=..., or let the client implement get_parameters()"
            )
        _check_numpy(record)
        names = _names_for(record, self._specs.values())
        # Where nothing is factorised or private, an adapter's list needs no names.
        plain = bool(self._specs) and not any(
            spec.weights or spec.private_keys for spec in self._specs.values()
        )
        if names is None and not (self._plain_names or plain):
            known = sorted({len(spec.keys) for spec in self._specs.values()})
            raise ConfigError(
                f"fedpara: the strategy sends a list of {len(record)} arrays that fits no model "
                f"built on the server (those have {' or '.join(map(str, known)) or 'no'} arrays): "
                f"{EXPECTED_LIST}"
                if known
                else f"fedpara: the strategy sends a list of {len(record)} arrays, but the server "
                f"built no converted model. Add to the server, after the imports: "
                f"Net = fedpara.factorised(Net)"
            )
        return _with_names(record, names or list(record))


def request_name(message: Message, record: str) -> str:
    """Return the name under which an app expects a record of a message; called on a client."""
    legacy = LEGACY_REQUESTS.get(message.metadata.message_type)
    named = record == PARAMETERS and legacy is not None and is_legacy(message)
    return str(legacy) if named else record


def answers_with_list(reply: Message) -> bool:
    """Return whether a reply of an app holds a list of arrays; called on a client."""
    return LEGACY_REPLIES.get(reply.metadata.message_type) in reply.content.array_records


def name_reply(
    reply: Message, asked: Sequence[str] | None, specs: Mapping[frozenset[str], ModelSpec]
) -> None:
    """Name the arrays of a legacy app's reply; called on a client.

    Args:
        reply: of the app. Replies of other apps and replies without arrays are not changed.
        asked: the names of the arrays that the client received; None if it received none.
        specs: the models that the app built.

    Raises:
        PayloadError: if the list has another length than the one received.
        ConfigError: if nothing was received, and no model that the app built has such a list.
    """
    name = LEGACY_REPLIES.get(reply.metadata.message_type)
    record = reply.content.array_records.get(name) if name else None
    if record is None or name is None or carries_nothing(record):
        return
    _check_numpy(record)
    if asked is not None and len(asked) != len(record):
        raise PayloadError(
            f"fedpara: the app answers with {len(record)} arrays and received {len(asked)}: "
            f"{EXPECTED_LIST}"
        )
    names = asked if asked is not None else _names_for(record, specs.values())
    if names is None and specs:
        raise ConfigError(
            f"fedpara: get_parameters() returns {len(record)} arrays, which is not a list of the "
            f"model that the client built: {EXPECTED_LIST}"
        )
    del reply.content[name]
    reply.content[PARAMETERS] = _with_names(record, names or list(record))


def unname_reply(content: RecordDict, kind: str) -> None:
    """Replace the named record by the one that the strategy expects; called on the server.

    Args:
        content: of a reply, decoded.
        kind: the message's type.
    """
    record = content.array_records.get(PARAMETERS)
    if record is not None and kind in LEGACY_REPLIES:
        del content[PARAMETERS]
        content[LEGACY_REPLIES[kind]] = without_names(record)


def named_state(
    state: dict[str, Tensor] | None, specs: Mapping[frozenset[str], ModelSpec]
) -> dict[str, Tensor] | None:
    """Return a state with the names of a model that fits, where its names are positions.

    A state with other names, or that fits no model, is returned unchanged.
    """
    if state is None or list(state) != [str(place) for place in range(len(state))]:
        return state
    names = _names_for(to_record(state), specs.values())
    return state if names is None else dict(zip(names, state.values(), strict=True))


def _names_for(record: ArrayRecord, specs: Iterable[ModelSpec]) -> tuple[str, ...] | None:
    """Return the names of the first model whose arrays have the record's number and shapes."""
    arrays = list(record.values())
    for spec in specs:
        if len(spec.keys) == len(arrays):
            places = {key: place for place, key in enumerate(spec.keys)}
            shapes = spec.shared_shapes()
            if all(arrays[places[key]].numpy().shape == shapes[key] for key in shapes):
                return spec.keys
    return None


def _with_names(record: ArrayRecord, names: Sequence[str]) -> ArrayRecord:
    return ArrayRecord(dict(zip(names, record.values(), strict=True)))


def without_names(record: ArrayRecord) -> ArrayRecord:
    """Return a record with places in the place of names, as the legacy API has them."""
    return ArrayRecord({str(place): array for place, array in enumerate(record.values())})


def _check_numpy(record: ArrayRecord) -> None:
    kinds = {array.stype for array in record.values()} - {NUMPY}
    if kinds:
        raise ConfigError(
            f"fedpara: the app serialises its parameters as {sorted(kinds)[0]!r}; the plugin reads "
            f"NumPy arrays only, as ndarrays_to_parameters() and NumPyClient make them"
        )


def _same(mine: Sequence[bytes], theirs: Sequence[bytes]) -> bool:
    return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))
