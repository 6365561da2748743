"""Apps of Flower's legacy API (``NumPyClient``, ``server_fn``): their arrays have places, no names.

Such an app sends ``state_dict().values()`` (or ``parameters()``) of its model as a list. Both sides
of the plugin give the arrays their names before they encode, and take them away again after they
have decoded, so that everything between knows named tensors only. While it travels, the record has
one name for training and evaluation alike: what a client has received with the one serves as the
reference for the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from flwr.common import ArrayRecord, Message, RecordDict
from torch import Tensor

from fedpara_plugins import ConfigError, ModelSpec, PayloadError
from fedpara_plugins_flower.messages.records import to_record, with_content

__all__ = [
    "PARAMETERS",
    "Namer",
    "asks_for_parameters",
    "carries_nothing",
    "is_legacy",
    "name_reply",
    "named_state",
    "unname_reply",
    "unname_request",
]

PARAMETERS = "parameters"
"""What a legacy record of arrays is called on its way. Not as the plugin's side records, which are
nobody's model: private state is held back from this one."""

ASKING = "get_parameters"
"""Type of the message that asks one client for the first weights."""

REQUESTS = {"train": "fitins.parameters", "evaluate": "evaluateins.parameters"}
REPLIES = {"train": "fitres.parameters", ASKING: "getparametersres.parameters"}

LISTS = (
    "the list must be that of model.state_dict().values(), or of model.parameters(), of the model "
    "that Net = fedpara.factorised(Net) builds, in that order and complete"
)


def is_legacy(message: Message) -> bool:
    """Whether a message comes from a strategy of the legacy API."""
    return any(
        name.startswith(("fitins.", "evaluateins.", "getparametersins.", "getpropertiesins."))
        for name in message.content
    )


def asks_for_parameters(message: Message) -> bool:
    """Whether a message asks a client for the first weights, or answers such a one."""
    kind: str = message.metadata.message_type
    return kind == ASKING


def carries_nothing(record: ArrayRecord) -> bool:
    """Whether a record holds no value: an empty list, as the legacy API writes it."""
    return all(not array.data for array in record.values())


class Namer:
    """Names what a legacy strategy sends.

    The legacy API makes a record anew for every client. The same bytes become the same record
    here, so that they are encoded once and not once for each client.

    Args:
        specs: the models that the server knows, by their set of names; looked up at each message.
        plain_names: whether places will do as names, since no model is converted.
    """

    def __init__(self, specs: Mapping[frozenset[str], ModelSpec], *, plain_names: bool) -> None:
        self._specs = specs
        self._plain_names = plain_names
        self._last: tuple[list[bytes], ArrayRecord] | None = None

    def named(self, message: Message) -> Message:
        """The message with names in the place of places; itself if it is not of that kind.

        Raises:
            ConfigError: no known model has such a list of arrays.
        """
        name = REQUESTS.get(message.metadata.message_type)
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
        if names is None and not self._plain_names:
            known = sorted({len(spec.keys) for spec in self._specs.values()})
            raise ConfigError(
                f"fedpara: the strategy sends a list of {len(record)} arrays that fits no model "
                f"built on the server (those have {' or '.join(map(str, known)) or 'no'} arrays): "
                f"{LISTS}"
                if known
                else f"fedpara: the strategy sends a list of {len(record)} arrays, but the server "
                f"built no converted model. Add to the server, after the imports: "
                f"Net = fedpara.factorised(Net)"
            )
        return _with_names(record, names or list(record))


def unname_request(message: Message) -> None:
    """On a client: give the app the record that it expects, in the place of the named one."""
    record = message.content.array_records.get(PARAMETERS)
    name = REQUESTS.get(message.metadata.message_type)
    if record is not None and name is not None:
        del message.content[PARAMETERS]
        message.content[name] = _without_names(record)


def name_reply(
    reply: Message, asked: Sequence[str] | None, specs: Mapping[frozenset[str], ModelSpec]
) -> None:
    """On a client: name the arrays of the app's answer.

    Args:
        reply: of a legacy app; any other stays as it is, and so does one without arrays.
        asked: the names of what the client received; None if it received no arrays.
        specs: the models that the app built.

    Raises:
        PayloadError: the list has another length than the one received.
        ConfigError: nothing was received, and no model that the app built has such a list.
    """
    name = REPLIES.get(reply.metadata.message_type)
    record = reply.content.array_records.get(name) if name else None
    if record is None or name is None or carries_nothing(record):
        return
    _check_numpy(record)
    if asked is not None and len(asked) != len(record):
        raise PayloadError(
            f"fedpara: the app answers with {len(record)} arrays and received {len(asked)}: {LISTS}"
        )
    names = asked if asked is not None else _names_for(record, specs.values())
    if names is None and specs:
        raise ConfigError(
            f"fedpara: get_parameters() returns {len(record)} arrays, which is no list of the "
            f"model that the client built: {LISTS}"
        )
    del reply.content[name]
    reply.content[PARAMETERS] = _with_names(record, names or list(record))


def unname_reply(content: RecordDict, kind: str) -> None:
    """On the server: give the strategy the record that it expects, in the place of the named one.

    Args:
        content: of a reply, decoded.
        kind: the message's type.
    """
    record = content.array_records.get(PARAMETERS)
    if record is not None and kind in REPLIES:
        del content[PARAMETERS]
        content[REPLIES[kind]] = _without_names(record)


def named_state(
    state: dict[str, Tensor] | None, specs: Mapping[frozenset[str], ModelSpec]
) -> dict[str, Tensor] | None:
    """A state whose names are places, with the names of the model that it fits, if any does."""
    if state is None or list(state) != [str(place) for place in range(len(state))]:
        return state
    names = _names_for(to_record(state), specs.values())
    return state if names is None else dict(zip(names, state.values(), strict=True))


def _names_for(record: ArrayRecord, specs: Iterable[ModelSpec]) -> tuple[str, ...] | None:
    """The names of the first model whose arrays these can be."""
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


def _without_names(record: ArrayRecord) -> ArrayRecord:
    return ArrayRecord({str(place): array for place, array in enumerate(record.values())})


def _check_numpy(record: ArrayRecord) -> None:
    kinds = {array.stype for array in record.values()} - {"numpy.ndarray"}
    if kinds:
        raise ConfigError(
            f"fedpara: the app serialises its parameters as {sorted(kinds)[0]!r}; the plugin reads "
            f"NumPy arrays only, as ndarrays_to_parameters() and NumPyClient make them"
        )


def _same(mine: Sequence[bytes], theirs: Sequence[bytes]) -> bool:
    return len(mine) == len(theirs) and all(a is b for a, b in zip(mine, theirs, strict=True))
