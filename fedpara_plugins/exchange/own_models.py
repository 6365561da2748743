"""The models that a client's own code has built: they alone say what is private.

A message describes a model, and whoever sends it may describe any. So a client compares every
description with what its own code has built, in this message or in an earlier one, and with its own
options as long as no model is known. What leaves is decided by its own models alone
(`fedpara_plugins.exchange.outgoing`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError, MismatchError, PayloadError
from fedpara_plugins.exchange.private_options import (
    check_options,
    hides_values,
    may_hide_halves,
    option_names,
)
from fedpara_plugins.exchange.records import plain_spec
from fedpara_plugins.models.private import matches
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_parts import Shapes, find_part, possible_names

__all__ = ["MOST_REMEMBERED", "OwnModel", "OwnModels", "is_apart", "shared_by"]

HERE, THERE = "this client", "the server"

MOST_REMEMBERED = 8
"""Models that a client remembers; an app that builds more of them is checked after it ran."""

WITHOUT_MODEL = (
    "this client's code has built no model with the plugin, so that nothing says which of the "
    "arrays are private, and none is sent. Add to the client, after the imports: "
    "Net = fedpara.factorised(Net)"
)


@dataclass(frozen=True)
class OwnModel:
    """A model that the client's code has built.

    Attributes:
        spec: of the model.
        nbytes: of its state, in bytes.
        shapes: of its state, as far as they are known.
    """

    spec: ModelSpec
    nbytes: int
    shapes: Shapes = field(default_factory=dict)

    def to_bytes(self, config: FedParaConfig) -> bytes:
        """Return the model for a client's storage.

        Args:
            config: with which it was converted.
        """
        fields = {
            "options": _digest(config),
            "model": self.spec.to_json(),
            "shared": list(self.spec.shared_keys),
            "bytes": self.nbytes,
            "shapes": self.shapes,
        }
        return json.dumps(fields).encode()

    @classmethod
    def from_bytes(cls, data: bytes, config: FedParaConfig) -> OwnModel | None:
        """Return a remembered model; None if it is damaged, or was converted otherwise."""
        try:
            fields = json.loads(data)
            if fields["options"] != _digest(config):
                return None
            spec = ModelSpec.from_json(fields["model"], tuple(map(str, fields["shared"])))
            shapes = {str(k): tuple(map(int, v)) for k, v in fields.get("shapes", {}).items()}
            return cls(spec, int(fields["bytes"]), shapes)
        except (PayloadError, ValueError, KeyError, TypeError, AttributeError):
            return None


class OwnModels:
    """What is known of a client's own models.

    Args:
        config: the client's own options.
        models: the models that are known.
        complete: whether there can be no others, as where the framework has the client's model
            before a message comes.
    """

    def __init__(
        self, config: FedParaConfig, models: Iterable[OwnModel] = (), *, complete: bool = False
    ) -> None:
        self._config = config
        self._complete = complete
        self._known: dict[frozenset[str], OwnModel] = {}
        self._built: list[OwnModel] = []
        for model in models:
            self._known[frozenset(model.spec.keys)] = model

    def add(self, spec: ModelSpec, nbytes: int, shapes: Shapes | None = None) -> None:
        """Take in a model that the client's code has just built.

        Args:
            spec: of the model.
            nbytes: of its state; 0 for another list of the same model's names.
            shapes: of its state, as far as they are known.
        """
        model = OwnModel(spec, nbytes, shapes or {})
        self._known[frozenset(spec.keys)] = model
        self._built.append(model)

    def __bool__(self) -> bool:
        """Return whether any model is known."""
        return bool(self._known)

    @property
    def specs(self) -> tuple[ModelSpec, ...]:
        """The specs of the models that are known."""
        return tuple(model.spec for model in self._known.values())

    @property
    def built(self) -> list[OwnModel]:
        """The last models that were built since this object was made, to be remembered."""
        return list({m.spec.fingerprint: m for m in self._built}.values())[-MOST_REMEMBERED:]

    @property
    def nbytes(self) -> int:
        """Bytes of the states of all models that are known."""
        return sum(model.nbytes for model in self._known.values())

    # What comes in

    def agreed(self, theirs: ModelSpec, shapes: Shapes | None = None) -> ModelSpec:
        """Return the own model, or the part of one, that a message describes.

        The description itself if none is known, or if it is of tensors that are no part of any.

        Args:
            theirs: the message's description.
            shapes: of the message's tensors.

        Raises:
            MismatchError: it is another model, splits this client's model otherwise, was made with
                other options, or cannot be told to be apart from what is private.
        """
        if self._complete:
            (mine,) = self.specs
            mine.check_equal(theirs, here=HERE, there=THERE)
            return _leaving_out(mine, theirs)
        known = self._known.get(frozenset(theirs.keys))
        part = known.spec if known is not None else self._part(theirs.keys, shapes or {})
        if part is not None:
            part.check_equal(theirs, here=HERE, there=THERE)
            return _leaving_out(part, theirs)
        if self._known and self.is_apart(theirs):
            self._check_nothing_hidden(theirs.keys)
            return theirs
        described = _split(theirs)
        for mine in self.specs:
            own = _split(mine)
            common = own.keys() & described.keys()
            # A model of which something is private is described as it is, and not in part.
            if any(own[k] != described[k] for k in common) or (common and mine.private_keys):
                mine.check_equal(theirs, here=HERE, there=THERE)
        check_options(theirs, self._config)
        return theirs

    def is_apart(self, theirs: ModelSpec) -> bool:
        """Return whether a description is of plain tensors whose names no own model has."""
        return all(is_apart(theirs, mine) for mine in self.specs)

    def has_part(self, names: Iterable[str], shapes: Shapes) -> bool:
        """Return whether tensors are a part of an own model.

        Args:
            names: of the tensors.
            shapes: of them, as far as they are known.
        """
        return self._part(names, shapes) is not None

    def _part(self, names: Iterable[str], shapes: Shapes) -> ModelSpec | None:
        models = [(model.spec, model.shapes) for model in self._known.values()]
        found = find_part(models, {name: shapes.get(name) for name in names})
        return None if found is None else found.spec

    def _check_nothing_hidden(self, names: Iterable[str]) -> None:
        """Raise for tensors of which nothing says whether they are private, if any may be."""
        if any(spec.private_keys for spec in self.specs):
            raise MismatchError(
                f"fedpara: it cannot be told which part of this client's model the arrays are (the "
                f"first is {next(iter(names), '')[:80]!r}), and a part of the model is private: "
                f"nothing is sent. Send them under the names of model.state_dict()"
            )

    def _may_be_private(self, record: Shapes) -> bool:
        """Return whether some way to read names makes one of them a private one."""
        return any(
            key in model.spec.private_keys
            for model in self._known.values()
            for named in possible_names(model.spec, model.shapes, record)
            for key in named.values()
        )

    def owns(self, spec: ModelSpec) -> bool:
        """Return whether a spec is that of a model that is known."""
        known = self._known.get(frozenset(spec.keys))
        return known is not None and known.spec.fingerprint == spec.fingerprint

    # What goes out

    def spec_for(self, record: Shapes, received: ModelSpec | None) -> ModelSpec:
        """Return the model, or the part of one, by which a record of a reply is split.

        Args:
            record: names and shapes of the record's tensors.
            received: the model of the record that it answers, if it answers one.

        Returns:
            An own model or a part of one; where none is known and nothing can be private but names
            that match the option ``private``, the received one. A spec without private names if
            the tensors have nothing to do with any.

        Raises:
            ConfigError: no own model is known, and there may be private values.
            MismatchError: the model received is not an own one, or private tensors may be among
                those of the record.
        """
        if not self._known:
            return self._without_model(record, received)
        if received is not None:
            self._check_own(received, record)
            return received
        wanted = frozenset(record)
        if (known := self._known.get(wanted)) is not None:
            return known.spec
        found = self._part(record, record)
        if found is None and self._may_be_private(record):
            self._check_nothing_hidden(record)
        return plain_spec(wanted) if found is None else found

    def _check_own(self, received: ModelSpec, shapes: Shapes) -> None:
        """Raise unless a model that was received is an own one, or a part of one, or apart."""
        if self.owns(received):
            return
        part = None if self._complete else self._part(received.keys, shapes)
        if part is not None:
            part.check_equal(received, here=HERE, there=THERE)
        elif not self._complete and self.is_apart(received):
            self._check_nothing_hidden(received.keys)
        else:
            self._closest(received).check_equal(received, here=HERE, there=THERE)

    def hidden_names(self, names: Iterable[str], spec: ModelSpec) -> set[str]:
        """Return those of some names that stay on the device, whatever record they are in.

        Args:
            names: of tensors.
            spec: the model that they belong to, as `spec_for` returns it.
        """
        specs = (spec, *self.specs)
        private = frozenset[str]().union(*(own.private_keys for own in specs))
        factors = set[str]().union(*(own.shared_shapes() for own in specs))
        return {
            name
            for name in names
            if name in private or (name not in factors and hides_values(name, self._config))
        }

    def check_named(self, names: Collection[str]) -> None:
        """Raise if tensors are numbered and not named, and any tensor may be private.

        Args:
            names: of the tensors of a record.

        Raises:
            PayloadError: names the remedy.
        """
        numbered = bool(names) and all(name.isdecimal() for name in names)
        known = {key for spec in self.specs for key in spec.keys}
        if not numbered or known.issuperset(names):
            return
        hidden = any(spec.private_keys for spec in self.specs) or may_hide_halves(self._config)
        if hidden or self._config.private:
            raise PayloadError(
                f"fedpara: the answer holds a list of {len(names)} arrays without names, which "
                f"may be private ones: answer with names, ArrayRecord(model.state_dict())"
            )

    def check_known(self) -> None:
        """Raise if there may be private values whose names no own model tells.

        Raises:
            ConfigError: names the line that the client lacks.
        """
        if not self._known and may_hide_halves(self._config):
            raise ConfigError(f"fedpara: {WITHOUT_MODEL}")

    def check_order_known(self, received: ModelSpec | None) -> None:
        """Raise if a list of arrays could be named otherwise than the client's own model is.

        A list has no names but those that the server gave to its places.

        Args:
            received: the model that the list is a state of.

        Raises:
            ConfigError: no own model says which of the places are private, and some may be.
        """
        if received is not None and self.owns(received):
            return
        if self._config.private or may_hide_halves(self._config):
            raise ConfigError(f"fedpara: {WITHOUT_MODEL}")

    def _closest(self, spec: ModelSpec) -> ModelSpec:
        names = _split(spec).keys()
        return max(self.specs, key=lambda mine: len(names & _split(mine).keys()))

    def _without_model(self, names: Iterable[str], received: ModelSpec | None) -> ModelSpec:
        self.check_known()
        given = list(names)
        for pattern in self._config.private:
            if given and not any(matches(name, (pattern,)) for name in given):
                # These may be other names for the same tensors: positions, or those of a wrapper.
                raise ConfigError(
                    f"fedpara: the option private ({pattern!r}) matches none of the {len(given)} "
                    f"names that the app answers with, such as {given[0][:80]!r}: {WITHOUT_MODEL}"
                )
        if received is None:
            return plain_spec(given)
        disputed = [w for w in received.weights if hides_values(w, self._config)]
        if disputed:
            # Factorised there, it would be sent; dense here, it would not.
            raise ConfigError(
                f"fedpara: {disputed[0]!r} is a factorised weight for the server, and this "
                f"client's option private ({option_names(self._config)}) names it: {WITHOUT_MODEL}"
            )
        return received


def _split(spec: ModelSpec) -> Mapping[str, tuple[str, bool]]:
    """Return, by name in the dense model, the method and whether the whole tensor is private."""
    factors = {key for weight in spec.weights for key in spec.factor_keys(weight).values()}
    plain = {key: ("", key in spec.own) for key in spec.keys if key not in factors}
    return plain | {weight: (plan.method.name, False) for weight, plan in spec.weights.items()}


def is_apart(theirs: ModelSpec, mine: ModelSpec) -> bool:
    """Return whether a description is of plain tensors, under names that a model does not have.

    Args:
        theirs: the description.
        mine: the model.
    """
    names = {*mine.keys, *mine.weights}
    return not theirs.weights and not theirs.own and names.isdisjoint(theirs.keys)


def _digest(config: FedParaConfig) -> str:
    """Return a hash of the options that decide how a model is converted."""
    options = {k: v for k, v in config.to_mapping().items() if "codec" not in k}
    return hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:16]


def shared_by(spec: ModelSpec, kept: Iterable[str]) -> str | None:
    """Return a name of private state that a model would share; None if there is none.

    Args:
        spec: of the model.
        kept: names of private tensors that the client holds.
    """
    layers = {name.rpartition(".")[0] for name in (*spec.keys, *spec.weights)}
    private = spec.private_keys
    hidden = {name.rpartition(".")[0] for name in private}
    for name in kept:
        layer = name.rpartition(".")[0]
        if name in private:
            continue
        if name in spec.keys or (layer in layers and layer not in hidden):
            return name
    return None


def _leaving_out(mine: ModelSpec, theirs: ModelSpec) -> ModelSpec:
    """Return this side's spec with what the other side's message leaves out as frozen."""
    if not theirs.frozen:
        return mine
    return replace(mine, frozen=theirs.frozen, buffers=theirs.buffers)
