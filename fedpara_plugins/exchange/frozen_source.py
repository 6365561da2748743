"""The frozen tensors of a client: its own models', or a copy that the server has sent once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from fedpara_plugins.errors import MismatchError
from fedpara_plugins.exchange.frozen import tensor_hash
from fedpara_plugins.exchange.records import State
from fedpara_plugins.models.looks_trained import looks_trained
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_parts import find_part, shapes_of
from fedpara_plugins.references import LostReferenceError

__all__ = ["FrozenSource", "LacksFrozenError", "OwnStates"]

OwnStates = Callable[[], Iterable[tuple[ModelSpec, Mapping[str, Tensor]]]]
"""Returns the models that the client's own code has built: their specs, and their states."""


class LacksFrozenError(LostReferenceError):
    """This client does not hold the frozen tensors of a record: the server has to send them.

    Attributes:
        record: its name.
    """

    def __init__(self, record: str, name: str) -> None:
        super().__init__(
            f"record {record!r} leaves {name!r} out, which is frozen on the server, and no model "
            f"here holds it"
        )
        self.record = record


class FrozenSource:
    """The frozen tensors that a client puts into what it receives.

    Args:
        own: returns the models that the client's own code has built.
        kept: returns the tensors that the server has sent once for a record; {} for none.
    """

    def __init__(self, own: OwnStates, kept: Callable[[str], State]) -> None:
        self._own = own
        self._kept = kept

    def values(self, record: str, spec: ModelSpec, shared: Mapping[str, Tensor]) -> State:
        """Return the values of all frozen tensors of a record.

        Args:
            record: its name.
            spec: of the record.
            shared: the tensors that came.

        Raises:
            LacksFrozenError: nothing here holds them.
            MismatchError: this client's own model holds others, which are no buffers and look
                trained; or one of them is private for it.
        """
        wanted = spec.frozen
        kept = self._kept(record) if wanted else {}
        found = _matching(wanted, kept)
        unlike: State = {}
        trained = False
        for own, state in self._own() if len(found) < len(wanted) else ():
            given = shapes_of(shared)
            part = find_part([(own, shapes_of(state))], {k: given.get(k) for k in spec.keys})
            if part is None:
                continue
            _check_none_private(part.spec, wanted)
            mine = {name: state[part.names[name]] for name in wanted}
            found = _matching(wanted, mine) | found
            unlike |= {name: value for name, value in mine.items() if name not in found}
            told = (value for name, value in mine.items() if name not in spec.buffers)
            trained = trained or any(map(_is_trained, told))
        missing = [name for name in wanted if name not in found]
        for name in missing:
            if trained and name in unlike and name not in spec.buffers:
                raise MismatchError(
                    f"fedpara: the frozen part differs at {name!r}: this client's has hash "
                    f"{tensor_hash(name, unlike[name])}, the server's has {wanted[name]}. Start "
                    f"both from the same weights, or let the server send its own: set the fedpara "
                    f'option send = "all"'
                )
        if missing:
            raise LacksFrozenError(record, missing[0])
        return {name: found[name] for name in wanted}


def _matching(wanted: Mapping[str, str], values: Mapping[str, Tensor]) -> State:
    return {
        name: values[name].detach().cpu()
        for name, digest in wanted.items()
        if name in values and tensor_hash(name, values[name]) == digest
    }


def _check_none_private(own: ModelSpec, wanted: Mapping[str, str]) -> None:
    """Raise for a tensor that this client keeps private: not even its hash is told."""
    if private := next((name for name in wanted if name in own.private_keys), None):
        raise MismatchError(
            f"fedpara: the server leaves {private!r} out as frozen, and this client keeps it "
            f"private. Set the same fedpara options on both sides"
        )


def _is_trained(value: Tensor) -> bool:
    return value.dim() >= 2 and value.is_floating_point() and looks_trained(value)
