"""The active run in this process, and the models that are built in it.

User code builds its model in many places, and some of them (an ``evaluate_fn``) do not have the
run's config. The client mod and the server wrapper therefore open a `Run` around the user's code,
and `fedpara_plugins_flower.factories.factorised` looks it up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias, TypeVar

import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Result
from torch import Tensor, nn

from fedpara_plugins import ConfigError, FedParaConfig, MismatchError, ModelSpec
from fedpara_plugins.exchange import (
    DenseRound,
    OwnModels,
    convert_or_keep,
    converted_copy,
    is_apart,
    plain_spec,
    zero_private_factors,
)
from fedpara_plugins.models import (
    Shapes,
    adopt_plans,
    agreed_config,
    find_part,
    frozen_tensors,
    keep_own_values,
    shapes_of,
    specs_for,
    static_buffers,
)
from fedpara_plugins.support import Outages, Storage
from fedpara_plugins.training import RoundProgress, round_progress, start_round
from fedpara_plugins_flower.logs import log
from fedpara_plugins_flower.settings import FlowerSettings

__all__ = ["Run", "Start", "StartHook", "active_run", "open_run", "to_dense"]

M = TypeVar("M", bound=nn.Module)

Start: TypeAlias = dict[str, Any]
"""Arguments of a strategy's ``start`` by name, with ``self``; a hook may replace them."""

StartHook: TypeAlias = Callable[[Start], AbstractContextManager[Callable[[Result], Result]]]
"""Returns a context around a strategy's run, which yields a function that may change the result."""

_active: ContextVar[Run | None] = ContextVar("fedpara_run", default=None)


@dataclass
class Run:
    """One run on one side.

    Attributes:
        settings: the run's options.
        side: ``"client"`` or ``"server"``.
        own: on a client, the models of its own code, from earlier messages and from this one.
        plans: on a client, the factorised weights of these models, known before they are read.
        standing_in: on a client without private state, the values that it was given for private
            tensors which are no factors; the models built here keep their own instead.
        expected: on a client, the models, or parts of them, that the server's message describes, as
            far as it has been read.
        received: on a client, the shapes of its tensors, by the set of names of each model.
        specs: the models that `factorised` built here, each under the set of names of its state,
            under that of its ``parameters()`` where the model has buffers too, and under that of
            those which are trained.
        shapes: of their states, under the same sets of names.
        built: the models that were built here, for their frozen tensors; on a server the first of
            each kind alone.
        previous_steps: on a client, optimizer steps of its previous training round, if known.
        plain: on a client with the option ``local`` set to ``dense``: specs of the plain model that
            the run starts from, under the names of its state and under those of its parameters.
        start: on such a client, the round of that model.
        storage: on a client, its state between rounds; committed when its reply is complete.
        starts: whether the first model built here keeps its values, because the run starts from
            them.
        trainings: progress of the models that were built here with training options.
        dtypes: on a server that continues an earlier run, dtypes of the tensors of its first round.
        on_loaded: called with every complete state that a model built here loads.
        on_encoded: on a client, called when its reply is encoded and before its state is kept, with
            the codec's error for each record: the tensors given minus those that the server
            decodes.
        on_evaluated: on a server with a ledger, called with a round and metrics of the model.
        on_start: on a server, hooks around each start of a strategy; see `strategy_hooks`.
        strategy: on a server, the strategy that was started last.
        starting: on a server, whether a strategy is running.
        own_loop_told: on a server, whether the log has said that no hook sees its rounds.
        left_out: on a server, number of replies left out since the last aggregation.
        outages: what this side could not write.
        other_runs: on a server, returns the runs of the same SuperLink that go on besides this one,
            as far as their servers live on this machine.
    """

    settings: FlowerSettings
    side: str
    own: OwnModels | None = None
    plans: list[ModelSpec] = field(default_factory=list)
    standing_in: Mapping[str, Tensor] = field(default_factory=dict)
    expected: list[ModelSpec] = field(default_factory=list)
    received: Mapping[frozenset[str], Shapes] = field(default_factory=dict)
    specs: dict[frozenset[str], ModelSpec] = field(default_factory=dict)
    shapes: dict[frozenset[str], Shapes] = field(default_factory=dict)
    built: list[tuple[ModelSpec, nn.Module]] = field(default_factory=list)
    previous_steps: int | None = None
    plain: dict[frozenset[str], ModelSpec] = field(default_factory=dict)
    start: DenseRound | None = None
    storage: Storage | None = None
    starts: bool = False
    trainings: list[RoundProgress] = field(default_factory=list)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    on_loaded: Callable[[dict[str, Tensor]], None] | None = None
    on_encoded: Callable[[Mapping[str, Mapping[str, Tensor]]], None] | None = None
    on_evaluated: Callable[[int, Mapping[str, float]], None] | None = None
    on_start: list[StartHook] = field(default_factory=list)
    strategy: object | None = None
    starting: bool = False
    own_loop_told: bool = False
    left_out: int = 0
    outages: Outages = field(default_factory=lambda: Outages(log))
    other_runs: Callable[[], list[str]] = list
    _begun: set[frozenset[str]] = field(default_factory=set)
    _beside: list[tuple[ModelSpec, bool]] = field(default_factory=list)

    @property
    def trains_dense(self) -> bool:
        """Return whether this side's models stay dense, and the mod projects their updates."""
        return self.side == "client" and self.settings.trains_dense

    @property
    def models(self) -> list[tuple[ModelSpec, Shapes]]:
        """The models that were built here: their specs, and the shapes of their states."""
        return [(spec, self.shapes.get(names, {})) for names, spec in self.specs.items()]

    def spec_of(self, tensors: Mapping[str, Tensor]) -> ModelSpec | None:
        """Return the spec of a state of a model that was built here, or of a part of one."""
        spec = self.specs.get(frozenset(tensors))
        if spec is not None:
            return spec
        part = find_part(self.models, shapes_of(tensors))
        return None if part is None else part.spec

    def states(self) -> Iterator[tuple[ModelSpec, Mapping[str, Tensor]]]:
        """Yield the models that were built here: their specs, and their states."""
        for spec, model in self.built:
            yield spec, model.state_dict()

    def frozen_in(
        self, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], frozenset[str]] | None:
        """Return the frozen ones of tensors that are sent, as the model holds them.

        Args:
            tensors: a state of a model that was built here, or a part of one.

        Returns:
            The frozen tensors by the names that are sent, and which of them are buffers; None if no
            such model is known.
        """
        for spec, model in self.built:
            part = find_part([(spec, shapes_of(model.state_dict()))], shapes_of(tensors))
            if part is not None:
                buffers = static_buffers(model)
                frozen = {**frozen_tensors(model), **buffers}
                found = {name: frozen[key] for name, key in part.names.items() if key in frozen}
                return found, frozenset(k for k in found if part.names[k] in buffers)
        return None

    def converted(self, model: M, *, beside: bool = False) -> M:
        """Convert a model that the user's code has just built, and keep its spec.

        A client that trains dense compares the model and returns it unchanged.

        Args:
            model: of the user's code.
            beside: whether another model, built together with it, is converted. Call
                `check_beside` after the last of them.

        Raises:
            MismatchError: if the server's message describes another model.
        """
        config = self._config(model, beside=beside)
        if self.trains_dense:
            return self._compared(model, config, beside=beside)
        model = convert_or_keep(model, config, may_keep=beside)
        spec = self._register(model, beside=beside)
        self._keep_built(spec, model)
        keep_own_values(model, self.standing_in)
        if self.side == "server":
            zero_private_factors(model)
        start_round(model, previous_steps=self.previous_steps)
        if (training := round_progress(model)) is not None:
            self.trainings.append(training)
        if self.on_loaded is not None:
            model.register_load_state_dict_post_hook(_report_loaded)  # type: ignore[no-untyped-call]
        return model

    def _keep_built(self, spec: ModelSpec, model: nn.Module) -> None:
        """Keep a model whose frozen tensors are asked for later; it may be frozen by then."""
        known = any(other.fingerprint == spec.fingerprint for other, _ in self.built)
        if self.settings.leaves_frozen and not (known and self.side == "server"):
            self.built.append((spec, model))

    def check_beside(self) -> None:
        """Raise if none of the models that were built together has a part in the message.

        Raises:
            MismatchError: the server's message describes another model.
        """
        built, self._beside = self._beside, []
        if built and self.expected and not any(met for _, met in built):
            spec = built[0][0]
            spec.check_equal(self.expected[0], here="this client", there="the server")

    def _register(
        self, model: nn.Module, *, plain_bytes: int = 0, beside: bool = False
    ) -> ModelSpec:
        self._adopt_plans(model)
        spec = ModelSpec.of(model)
        alike = _of_parameters(spec, model)
        specs = {frozenset(s.keys): s for s in (alike, spec)}
        trained = _of_trained(spec, model)
        if trained is not None:
            specs.setdefault(frozenset(trained.keys), trained)
        shapes = shapes_of(model.state_dict())
        met = self._meets_expected(spec, specs, shapes)
        if beside:  # an encoder, of which only the classifier beside it is sent
            self._beside.append((spec, met))
        elif self.expected and not met:
            spec.check_equal(self.expected[0], here="this client", there="the server")
        self.specs |= specs
        self.shapes |= dict.fromkeys(specs, shapes)
        if self.own is not None:
            size = plain_bytes + sum(value.nbytes for value in model.state_dict().values())
            for known in specs.values():
                self.own.add(known, size if known is spec else 0, shapes)
        return spec

    def _adopt_plans(self, model: nn.Module) -> None:
        """Take over the plans that the other side, or the first such model here, has made."""
        known = self.specs.get(frozenset(model.state_dict())) if self.side == "server" else None
        first = [] if known is None else [known]
        for agreed in specs_for(model, self.plans) + first:
            adopt_plans(model, agreed)

    def _meets_expected(
        self, spec: ModelSpec, specs: Mapping[frozenset[str], ModelSpec], shapes: Shapes
    ) -> bool:
        """Return whether a model that was built has a part in what the message describes.

        Raises:
            MismatchError: it has, and differs.
        """
        met = any(frozenset(expected.keys) in self.specs for expected in self.expected)
        # Another model's names may all be among this one's: it is no part of this one for that.
        whole = any(frozenset(expected.keys) in specs for expected in self.expected)
        for expected in self.expected:
            names = frozenset(expected.keys)
            mine = specs.get(names)
            if mine is None and names not in self.specs and not whole:
                given = self.received.get(names, {})
                part = find_part([(spec, shapes)], {key: given.get(key) for key in expected.keys})
                mine = None if part is None else part.spec
            if mine is not None:
                mine.check_equal(expected, here="this client", there="the server")
                met = True
            met = met or is_apart(expected, spec)
        return met

    def _compared(self, model: M, config: FedParaConfig, *, beside: bool = False) -> M:
        first = self.starts and not self.specs
        factors = converted_copy(model, config)
        size = sum(value.nbytes for value in model.state_dict().values())
        spec = self._register(factors, plain_bytes=size, beside=beside)
        self._keep_built(spec, factors)
        keep_own_values(model, self.standing_in)
        if first:
            self.start = DenseRound(spec, factors.state_dict())
            model.load_state_dict(self.start.dense)
            lists = tuple(self.start.dense), tuple(name for name, _ in model.named_parameters())
            self.plain = {frozenset(names): plain_spec(names) for names in lists}
        return model

    def _config(self, model: nn.Module, *, beside: bool = False) -> FedParaConfig:
        """Return the config; only a model that the run starts from keeps its values."""
        names = frozenset(model.state_dict()) if isinstance(model, nn.Module) else frozenset()
        first = (self.side == "server" or self.starts) and names not in self._begun
        self._begun.add(names)
        config = self.settings.config
        if first or not isinstance(model, nn.Module):
            return config
        known = specs_for(model, (*self.plans, *self.specs.values()), beside=beside)
        return agreed_config(config, known)


def active_run() -> Run | None:
    """Return the run that is active in this context, if any."""
    return _active.get()


@contextlib.contextmanager
def open_run(run: Run) -> Iterator[Run]:
    """Make ``run`` the active one while user code runs."""
    token = _active.set(run)
    try:
        yield run
    finally:
        _active.reset(token)


def _of_parameters(spec: ModelSpec, model: nn.Module) -> ModelSpec:
    """Return the spec of a list of ``model.parameters()``, as apps send it that keep buffers."""
    names = {name for name, _ in model.named_parameters()}
    keys = tuple(key for key in spec.keys if key in names)
    return replace(spec, keys=keys, own={k: v for k, v in spec.own.items() if k in names})


def _of_trained(spec: ModelSpec, model: nn.Module) -> ModelSpec | None:
    """Return the spec of a list of the parameters that are trained; None if these are no part."""
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    try:
        part = find_part([(spec, {})], dict.fromkeys(names))
    except MismatchError:
        return None  # a private factor is trained, and not all shared ones
    return None if part is None else part.spec


def to_dense(arrays: ArrayRecord | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the dense state of a converted model, for ``load_state_dict`` of the plain model.

    Call it inside the app, for example on ``result.arrays``. For pFedPara on the server the result
    is W1, the shared model (private part zero).

    Args:
        arrays: the state of a model that `factorised` built in the same run.

    Raises:
        ConfigError: if it is called outside a run, or no model with these names was built in it.
    """
    state: Mapping[str, Tensor]
    state = arrays.to_torch_state_dict() if isinstance(arrays, ArrayRecord) else arrays
    run = active_run()
    if run is not None and run.trains_dense:
        return dict(state)  # such a client's state is dense already
    spec = run.spec_of(state) if run else None
    if spec is None:
        raise ConfigError(
            "fedpara: to_dense() knows only models that factorised(...) built in the same run, "
            "and none of them has these names; call it inside the app's main function"
        )
    return spec.dense_state(state)


def _report_loaded(module: nn.Module, _incompatible_keys: Any) -> None:
    run = active_run()
    if run is not None and run.on_loaded is not None:
        run.on_loaded({k: v.detach().clone() for k, v in module.state_dict().items()})
