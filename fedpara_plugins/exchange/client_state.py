"""The state that a client keeps between rounds, in any framework; it never leaves the device."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

from fedpara_plugins.codecs import Roll, decode_payload, encode_payload, parse_codec
from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, PayloadError
from fedpara_plugins.exchange.own_models import MOST_REMEMBERED, OwnModel, shared_by
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.references import ClientReferences
from fedpara_plugins.support.storage import PrefixView

__all__ = ["ClientState", "PrivateParts"]

log = logging.getLogger("fedpara")

PRIVATE = "private/"
"""Prefix of private state. Each model has an entry of its own, and so has each way of converting
one: no state is ever written over by another model's."""

OWN = "own/"
"""Prefix of the models that this client's own code has built."""

MOST_RECORDS_KEPT = 16
"""Records of which anything is kept; who sends them names them, and apps have few."""

MOST_PRIVATE = 32
"""Private states that are kept. None is dropped for a newer one, or a server that describes one
model after the other would take a client's private state away."""

STEPS = "steps"
ROLL = "roll"
REFERENCE = "reference/"
RESIDUAL = "residual/"
SENT_ONCE = "frozen/"


class ClientState:
    """A client's private state, the references it received, and the errors of its codec.

    Args:
        storage: written by the ``keep`` methods alone, and committed by the caller.
        client: its name in the log.
        place: location of the storage, for the log.
    """

    def __init__(
        self,
        storage: MutableMapping[str, bytes],
        client: object = "of no name",
        place: object = "its storage",
    ) -> None:
        self._storage = storage
        self._client = client
        self._place = place
        self.references = ClientReferences(PrefixView(storage, REFERENCE))

    def private(
        self, spec: ModelSpec, shared: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], bool]:
        """Return the private tensors by name, and whether they are the seeded first ones.

        Those of another model or other options do not count. They stay where they are, with a line
        in the log.

        Args:
            spec: the model.
            shared: its shared state, for the dtypes.
        """
        first = spec.initial_private(shared)
        kept = self._load(private_key(spec))
        if kept is not None and _same_shapes(kept, first):
            return kept, False
        if kept is None and private_key(spec) in self._storage:
            log.warning(
                "fedpara: client %s: its private state in %s is damaged and cannot be read; this "
                "client starts from the first private state", self._client, self._place,
            )  # fmt: skip
        if first:
            self._warn_of_other_states(spec, first)
        return first, True

    def keep_private(self, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        """Replace the private tensors of this model.

        Raises:
            ConfigError: there are those of many other models already.
        """
        if not tensors:
            return
        key = private_key(spec)
        held = sum(each.startswith(PRIVATE) for each in self._storage)
        if key not in self._storage and held >= MOST_PRIVATE:
            raise ConfigError(
                f"fedpara: client {self._client} holds private state of {held} models in "
                f"{self._place}, and keeps no more: this run describes another one. If that is "
                f"what you want, choose another state-dir; otherwise the server changes its model "
                f"from message to message"
            )
        self._save(key, tensors)

    def check_still_private(self, spec: ModelSpec) -> None:
        """Raise if a model shares what this client keeps private state of.

        Private values trained with one set of options would leave with another.

        Args:
            spec: of the model.

        Raises:
            ConfigError: names the tensor, and what to do.
        """
        for key in self._storage:
            if not key.startswith(PRIVATE) or key == private_key(spec):
                continue
            name = shared_by(spec, self._load(key) or {})
            if name is not None:
                methods = ", ".join(sorted({p.method.name for p in spec.weights.values()}))
                raise ConfigError(
                    f"fedpara: client {self._client} holds private state of this model ({name!r}, "
                    f"in {self._place}), and this run (method {methods or 'none'}) would share "
                    f"that part of it. Set the options of the run that made it, or let go of the "
                    f"private state: choose another state-dir, or remove that one"
                )

    def own_models(self, config: FedParaConfig) -> list[OwnModel]:
        """Return the models that this client's own code has built with these options."""
        keys = [key for key in self._storage if key.startswith(OWN)]
        found = (OwnModel.from_bytes(self._storage[key], config) for key in keys)
        return [model for model in found if model is not None]

    def remember(self, models: Sequence[OwnModel], config: FedParaConfig) -> None:
        """Remember models besides those that are known, the last ones of them all.

        Args:
            models: that this client's own code has built.
            config: with which they were converted.
        """
        new = {OWN + model.spec.fingerprint: model.to_bytes(config) for model in models}
        if all(self._storage.get(key) == value for key, value in new.items()):
            return
        kept = {OWN + m.spec.fingerprint: m.to_bytes(config) for m in self.own_models(config)}
        last = dict(list({**kept, **new}.items())[-MOST_REMEMBERED:])
        for key in [key for key in self._storage if key.startswith(OWN) and key not in last]:
            del self._storage[key]
        for key, value in last.items():
            self._storage[key] = value

    def _warn_of_other_states(self, spec: ModelSpec, first: Mapping[str, Tensor]) -> None:
        for key in self._storage:
            found = self._load(key) if key.startswith(PRIVATE) else None
            if found is None:
                continue
            methods = ", ".join(sorted({p.method.name for p in spec.weights.values()})) or "none"
            log.warning(
                "fedpara: client %s: %s holds private state of another model or of other options: "
                "%s, while this run's method is %s. This client starts from the seeded private "
                "state, and what was found stays there untouched: set the earlier options to go on "
                "with it, or choose another state-dir for each run",
                self._client,
                self._place,
                _unlike(found, first),
                methods,
            )
            return

    def frozen(self, record: str) -> dict[str, Tensor]:
        """Return the frozen tensors that the server has sent once for a record; {} for none."""
        return self._load(SENT_ONCE + record) or {}

    def keep_frozen(self, record: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace the frozen tensors of a record."""
        self._save(SENT_ONCE + record, tensors)

    def residual(self, record: str) -> dict[str, Tensor] | None:
        """Return what the codec lost of a record's last reply; None if nothing is known."""
        return self._load(RESIDUAL + record)

    def keep_residual(self, record: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace what the codec lost; nothing (after a first contact) forgets it."""
        if tensors:
            self._save(RESIDUAL + record, tensors)
        else:
            self._storage.pop(RESIDUAL + record, None)

    def keep_few(self, records: Collection[str]) -> None:
        """Forget what is held of other records than these, if it is held of many.

        Args:
            records: names of those of this round.
        """
        places = [k[len(REFERENCE) :] for k in self._storage if k.startswith(REFERENCE)]
        held = dict.fromkeys(place.rpartition("/")[0] for place in places)
        for part in (RESIDUAL, SENT_ONCE):
            held |= dict.fromkeys(k[len(part) :] for k in self._storage if k.startswith(part))
        others = [name for name in held if name not in records]
        for name in others[: max(0, len(held) - MOST_RECORDS_KEPT)]:
            self.references.forget(name)
            self.keep_residual(name, {})
            self._storage.pop(SENT_ONCE + name, None)

    def rolls(self) -> dict[str, Roll]:
        """Return the roll of the last message of several records, by its hash; empty for none."""
        stored = self._storage.get(ROLL)
        known = None if stored is None else Roll.from_bytes(stored)
        return {} if known is None else {known.digest: known}

    def keep_roll(self, roll: Roll) -> None:
        """Replace the roll."""
        if roll.digest not in self.rolls():
            self._storage[ROLL] = roll.to_bytes()

    def steps(self) -> int | None:
        """Return the optimizer steps of the last round that was trained here; None before it."""
        text = self._storage.get(STEPS, b"").decode("ascii", "replace")
        return int(text) if text.isdecimal() else None

    def keep_steps(self, steps: int) -> None:
        """Replace the number of steps; 0 (an evaluation, say) changes nothing."""
        if steps:
            self._storage[STEPS] = str(steps).encode()

    def _load(self, key: str) -> dict[str, Tensor] | None:
        payload = self._storage.get(key)
        if payload is None:
            return None
        try:
            return decode_payload(payload, limit=2 * len(payload)).tensors
        except PayloadError:
            return None  # what is damaged is not held

    def _save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        self._storage[key] = encode_payload(dict(tensors), codec=parse_codec("none"))


class PrivateParts:
    """The private values in one reply: one state per model, however many records hold it."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, ModelSpec, dict[str, Tensor]]] = {}

    def add(self, record: str, spec: ModelSpec, tensors: Mapping[str, Tensor]) -> None:
        """Take in the private part of a record.

        Args:
            record: its name.
            spec: the model that it is a state of.
            tensors: the state, or part of it; shared tensors are passed over.

        Raises:
            PayloadError: another record of the same model has other private values.
        """
        own = {name: value for name, value in tensors.items() if name in spec.private_keys}
        if not own:
            return
        key = private_key(spec)
        if key in self._found:
            self._check_alike(key, record, own)
        self._found[key] = record, spec, own

    def _check_alike(self, key: str, record: str, own: Mapping[str, Tensor]) -> None:
        earlier, _, values = self._found[key]
        unlike = [k for k, v in own.items() if k in values and not torch.equal(v, values[k])]
        if unlike or values.keys() != own.keys():
            raise PayloadError(
                f"fedpara: records {earlier!r} and {record!r} of the reply are of one model, and "
                f"their private values differ{f' in {unlike[0]!r}' if unlike else ''}: this client "
                f"can keep one of them. Answer with private names in the trained record alone "
                f"(fedpara_plugins.split(model).shared for the other)"
            )

    def keep(self, state: ClientState) -> None:
        """Replace the private tensors of all these models in a client's state."""
        for _, spec, own in self._found.values():
            state.keep_private(spec, own)


def private_key(spec: ModelSpec) -> str:
    """Return the key of a model's private state: the same for all models that can load it.

    Names and shapes alone are not enough: with another scale, the same factors mean another weight.
    """
    converted = [
        [weight, plan.method.name, list(plan.shape), plan.rank, plan.scale, plan.tanh]
        for weight, plan in spec.weights.items()
        if plan.private_names
    ]
    own = sorted((name, list(own.shape), own.onto) for name, own in spec.own.items())
    return PRIVATE + hashlib.sha256(json.dumps([converted, own]).encode()).hexdigest()[:16]


def _same_shapes(kept: Mapping[str, Tensor], first: Mapping[str, Tensor]) -> bool:
    return kept.keys() == first.keys() and all(kept[k].shape == first[k].shape for k in first)


def _unlike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """Return the first difference, in words."""
    for name in {**expected, **found}:
        there, here = (
            f"of shape {tuple(tensors[name].shape)}" if name in tensors else "not private"
            for tensors in (found, expected)
        )
        if there != here:
            return f"{name!r} is {there} there and {here} in this run"
    return "names and shapes are those of this run, how weights are composed of them is not"
