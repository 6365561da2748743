"""The model, or the part of one, that a record of a server's messages is a state of."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fedpara_plugins.config import FedParaConfig
from fedpara_plugins.errors import ConfigError
from fedpara_plugins.exchange.own_models import is_apart
from fedpara_plugins.exchange.records import plain_spec
from fedpara_plugins.models.spec import ModelSpec
from fedpara_plugins.models.state_parts import Shapes, find_part, shapes_of
from fedpara_plugins.models.wrapper_names import wrapper_hint

__all__ = ["RecordModels"]

log = logging.getLogger("fedpara")

APART = (
    "fedpara: it cannot be told which part of the model record %r is (%d tensors, the first %r): "
    "the codec alone acts on it"
)


class RecordModels:
    """Finds the model of each record that a server sends.

    Args:
        config: of the run.
        add_line: the sentence that says where a user lets the model be converted.
        in_place: the sentence for a user who has done so, and whose arrays are of another model.
    """

    def __init__(self, config: FedParaConfig, *, add_line: str, in_place: str) -> None:
        self._config = config
        self._add_line = add_line
        self._in_place = in_place
        self._told: set[str] = set()

    def find(
        self,
        record: str,
        tensors: Mapping[str, Tensor],
        models: Sequence[tuple[ModelSpec, Shapes]],
    ) -> ModelSpec:
        """Return the spec of a record: that of a model, of a part of one, or a plain one.

        Args:
            record: its name.
            tensors: what it holds.
            models: specs and shapes of those that the server has built.

        Raises:
            ConfigError: the tensors should be those of a converted model, and are not.
        """
        names = frozenset(tensors)
        for spec, _ in models:
            if names == frozenset(spec.keys):
                return spec
        if (part := find_part(models, shapes_of(tensors))) is not None:
            return part.spec
        self._check(record, tensors, [spec for spec, _ in models])
        if models and record not in self._told:
            self._told.add(record)
            log.info(APART, record, len(tensors), next(iter(tensors), ""))
        return plain_spec(tensors)

    def _check(
        self, record: str, tensors: Mapping[str, Tensor], specs: Iterable[ModelSpec]
    ) -> None:
        config, specs = self._config, list(specs)
        method = f"method {config.method!r}" if config.method != "none" else ""
        asked = method or ("the option 'private'" if config.private else "")
        first = next(iter(tensors), None)
        if asked and not specs:
            raise ConfigError(
                f"fedpara: {asked} is on, but the server sends a record {record!r} that belongs to "
                f"no converted model (its first name is {first!r}). {self._add_line}"
            )
        for spec in specs:
            hint = wrapper_hint(tensors, spec.keys)
            if hint and asked:
                raise ConfigError(
                    f"fedpara: the server sends a record {record!r} that belongs to no converted "
                    f"model:{hint}"
                )
            if spec.weights and not is_apart(plain_spec(tensors), spec):
                raise ConfigError(
                    f"fedpara: {asked} is on, but the server sends a record {record!r} that "
                    f"belongs to no converted model (its first name is {first!r}), though it has "
                    f"built one. {self._in_place}"
                )
            if spec.private_keys:
                raise ConfigError(
                    f"fedpara: it cannot be told which part of the model record {record!r} is (its "
                    f"first name is {first!r}), and a part of the model is private. Send it under "
                    f"the names of model.state_dict()"
                )
